local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local value64 = base64(value)
local n = 0
function init(args) n = tonumber(args[1]) or 0 end
function request()
   n = n + 1
   return wrk.format("POST", "/v3/kv/put", nil, string.format('{"key":"%s","value":"%s"}', base64(string.format("f%015d", n)), value64))
end
