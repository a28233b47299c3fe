local here = debug.getinfo(1, "S").source:match("@(.*/)")
dofile(here .. "common.lua")

-- "<number of leases>": the ids of a fresh cluster count from 1.
local leases = 1
function init(args) seed(args); leases = tonumber(args[1]) end
function request() return wrk.format("POST", string.format("/v1/leases/%d/keepalive", math.random(leases))) end
