local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local large = string.rep("v", 65536)
key_space = 1000
function init(args) seed(args) end
function request() return wrk.format("PUT", "/" .. new_key(), nil, large) end
