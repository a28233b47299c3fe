local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

-- "<ttl in seconds> <number of the first key>"
local ttl, n
function init(args)
   ttl, n = args[1]:match("^(%d+) (%d+)")
   n = tonumber(n)
end
function request()
   n = n + 1
   return wrk.format("PUT", string.format("/l%015d?ttl=%ss", n, ttl), nil, value)
end
