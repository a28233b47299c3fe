local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local value64 = base64(value)
local n = 0
-- wrk makes a request to look at before it begins, which is never sent.
function init(args) n = (tonumber(args[1]) or 0) - 2 end
function request()
   n = n + 1
   return wrk.format("POST", "/v3/kv/put", nil, string.format('{"key":"%s","value":"%s"}', base64(string.format("f%015d", math.max(n, 1))), value64))
end
