local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

-- "<ttl in seconds> <any>"
local body
function init(args) body = string.format('{"ttl":%s}', args[1]:match("^%d+")) end
function request() return wrk.format("POST", "/v1/leases", nil, body) end
