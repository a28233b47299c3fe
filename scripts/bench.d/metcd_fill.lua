local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local n = 0
function init(args) n = tonumber(args[1]) or 0 end
function request()
   n = n + 1
   return wrk.format("PUT", string.format("/f%015d", n), nil, value)
end
