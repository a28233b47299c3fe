local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

local query = ""
function init(args) seed(args); query = args[1] or "" end
function request() return wrk.format("GET", "/k000000000000001" .. query) end
-- The key may be absent; an answer is an answer.
function response(status) end
