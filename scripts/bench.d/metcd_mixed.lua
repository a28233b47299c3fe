local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

function init(args) seed(args) end
function request()
   if math.random(10) == 1 then return wrk.format("PUT", "/" .. filled_key(), nil, value) end
   return wrk.format("GET", "/" .. filled_key())
end
