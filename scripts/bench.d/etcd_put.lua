local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local value64 = base64(value)
function init(args) seed(args) end
function request()
   return wrk.format("POST", "/v3/kv/put", nil, string.format('{"key":"%s","value":"%s"}', base64(new_key()), value64))
end
