local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local large64 = base64(string.rep("v", 65536))
key_space = 1000
function init(args) seed(args) end
function request()
   return wrk.format("POST", "/v3/kv/put", nil, string.format('{"key":"%s","value":"%s"}', base64(new_key()), large64))
end
