-- Shared by the load scripts: 16-byte keys, 256-byte values, and one line of results.
value = string.rep("v", 256)
key_space = 100000

function new_key()
   return string.format("k%015d", math.random(key_space))
end

-- One of those that the fill script wrote.
function filled_key()
   return string.format("f%015d", math.random(key_space))
end

-- Standard base64; wrk's Lua has none.
local alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
function base64(text)
   local out = {}
   for i = 1, #text, 3 do
      local a, b, c = text:byte(i, i + 2)
      local n = a * 65536 + (b or 0) * 256 + (c or 0)
      for j = 0, 3 do
         local index = math.floor(n / 64 ^ (3 - j)) % 64 + 1
         out[#out + 1] = (i + j - 1 > #text) and "=" or alphabet:sub(index, index)
      end
   end
   return table.concat(out)
end

function seed(args)
   math.randomseed(os.time() * 1000 + (tonumber(args[2]) or 0))
end

function done(summary, latency, requests)
   local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout
   io.write(string.format("RESULT %.1f %.3f %.3f %d\n", summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000, bad))
end
