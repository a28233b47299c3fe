local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

function init(args) seed(args) end
function request() return wrk.format("PUT", "/" .. new_key(), nil, value) end
