local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local body = string.format('{"key":"%s"}', base64("k000000000000001"))
function init(args)
   seed(args)
   if args[1] == "serializable" then
      body = string.format('{"key":"%s","serializable":true}', base64("k000000000000001"))
   end
end
function request() return wrk.format("POST", "/v3/kv/range", nil, body) end
