local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local n = 0
-- wrk makes a request to look at before it begins, which is never sent.
function init(args) n = (tonumber(args[1]) or 0) - 2 end
function request()
   n = n + 1
   return wrk.format("PUT", string.format("/f%015d", math.max(n, 1)), nil, value)
end
