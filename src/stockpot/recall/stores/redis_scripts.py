"""The Lua scripts of the Redis store: each runs whole or not at all, alone.

Keys, after the prefix; ID is `Entry.id`:

    e:ID          hash: `e` the entry without its answer, `a` the answer. Expires when the entry does
    state         hash: `born` (changes when all was lost), `head` (of the log), `made` (a counter), `bytes`
    known         hash: of each entry, ID to its bytes and the names of the index sets it is in
    used          sorted set: ID by its last use
    made          sorted set: ID by the order of writing; `parted` those with a partition
    ends          sorted set: ID by when it expires, for what Redis expired by itself
    i:KIND:VALUE  set: the entries with that tag (t), model (m), tenant (n), writer (w)
    log           sorted set: invalidations by their number
    seen          sorted set: evidence by its number; `noted` counts it

Only `e:` expires: what tells which entries there are must outlast them, and is taken away with them.
"""

from __future__ import annotations

_COMMON = """
local P = KEYS[1]
local LOGGED = 10000

local function drop(id)
  local known = redis.call('HGET', P .. 'known', id)
  redis.call('DEL', P .. 'e:' .. id)
  if not known then return 0 end
  local facts = cmsgpack.unpack(known)
  for _, set in ipairs(facts[2]) do redis.call('SREM', P .. set, id) end
  for _, set in ipairs({'used', 'made', 'parted', 'ends'}) do redis.call('ZREM', P .. set, id) end
  redis.call('HDEL', P .. 'known', id)
  redis.call('HINCRBY', P .. 'state', 'bytes', -facts[1])
  return 1
end

local function note(packed)
  local head = redis.call('HINCRBY', P .. 'state', 'head', 1)
  redis.call('ZADD', P .. 'log', head, string.format('%d:', head) .. packed)
  redis.call('ZREMRANGEBYSCORE', P .. 'log', '-inf', head - LOGGED)
  return head
end

local function position(born)
  redis.call('HSETNX', P .. 'state', 'born', born)
  redis.call('HSETNX', P .. 'state', 'head', 0)
  return redis.call('HMGET', P .. 'state', 'born', 'head')
end
"""

WRITE = (
    _COMMON
    + """
-- ARGV: a name to be born with, born and head as last seen, now, capacity, evidence kept, uses (MessagePack:
-- id, time, ...), how many pieces of evidence; those; then of each entry ten: id, bytes, lives for (ms),
-- expires at, used at, index sets (MessagePack), is in a partition, packed, answer, the invalidation of
-- the one it replaces.
local at = position(ARGV[1])
if at[1] ~= ARGV[2] or at[2] ~= ARGV[3] then return {0} end
local now, capacity = tonumber(ARGV[4]), tonumber(ARGV[5])
local evidence = tonumber(ARGV[8])
local expired, evicted = 0, 0
for place = 9 + evidence, #ARGV, 10 do
  local id, key = ARGV[place], P .. 'e:' .. ARGV[place]
  if drop(id) == 1 then note(ARGV[place + 9]) end
  redis.call('HSET', key, 'e', ARGV[place + 7], 'a', ARGV[place + 8])
  redis.call('PEXPIRE', key, ARGV[place + 2])
  local made = redis.call('HINCRBY', P .. 'state', 'made', 1)
  redis.call('ZADD', P .. 'made', made, id)
  if ARGV[place + 6] == '1' then redis.call('ZADD', P .. 'parted', made, id) end
  redis.call('ZADD', P .. 'used', ARGV[place + 4], id)
  redis.call('ZADD', P .. 'ends', ARGV[place + 3], id)
  local sets = cmsgpack.unpack(ARGV[place + 5])
  for _, set in ipairs(sets) do redis.call('SADD', P .. set, id) end
  redis.call('HSET', P .. 'known', id, cmsgpack.pack({tonumber(ARGV[place + 1]), sets}))
  redis.call('HINCRBY', P .. 'state', 'bytes', ARGV[place + 1])
end
local uses = cmsgpack.unpack(ARGV[7])
for place = 1, #uses, 2 do redis.call('ZADD', P .. 'used', 'XX', 'GT', uses[place + 1], uses[place]) end
for place = 9, 8 + evidence do
  redis.call('ZADD', P .. 'seen', redis.call('HINCRBY', P .. 'state', 'noted', 1), ARGV[place])
end
redis.call('ZREMRANGEBYRANK', P .. 'seen', 0, -tonumber(ARGV[6]) - 1)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'ends', '-inf', now, 'LIMIT', 0, 200)) do
  expired = expired + drop(id)
end
while tonumber(redis.call('HGET', P .. 'state', 'bytes') or 0) > capacity do
  local oldest = redis.call('ZRANGE', P .. 'used', 0, 0)
  if #oldest == 0 then break end
  evicted = evicted + drop(oldest[1])
end
local state = redis.call('HMGET', P .. 'state', 'head', 'bytes')
return {1, tonumber(state[1]), redis.call('HLEN', P .. 'known'), tonumber(state[2] or 0), evicted, expired}
"""
)

CHANGES = (
    _COMMON
    + """
-- ARGV: a name to be born with, head as last seen.
local at = position(ARGV[1])
if tonumber(at[2]) <= tonumber(ARGV[2]) then return {at[1], at[2], {}} end
return {at[1], at[2], redis.call('ZRANGEBYSCORE', P .. 'log', '(' .. ARGV[2], '+inf')}
"""
)

LOG = "#!lua flags=allow-oom\n" + _COMMON + "position(ARGV[1])\nreturn note(ARGV[2])\n"
"""ARGV: a name to be born with, an invalidation. Allowed in a Redis that is full, as `DROP` is."""

DROP = (
    "#!lua flags=allow-oom\n"
    + _COMMON
    + "local dropped = 0\nfor _, id in ipairs(ARGV) do dropped = dropped + drop(id) end\nreturn dropped\n"
)
"""ARGV: ids."""
