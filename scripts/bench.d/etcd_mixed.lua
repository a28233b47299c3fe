local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local value64 = base64(value)
function init(args) seed(args) end
function request()
   if math.random(10) == 1 then
      return wrk.format("POST", "/v3/kv/put", nil, string.format('{"key":"%s","value":"%s"}', base64(filled_key()), value64))
   end
   return wrk.format("POST", "/v3/kv/range", nil, string.format('{"key":"%s"}', base64(filled_key())))
end
