"""The Lua scripts of the Redis store, one for each verb: each runs whole or not at all, alone.

Of each scope there are three keys:

    PREFIX:allow:KIND:ID         hash: the counters, and of each reservation where it was charged (h.ID)
    PREFIX:allow:KIND:ID:held    sorted set: reservations by the end of their leases, in milliseconds
    PREFIX:allow:KIND:ID:gone    sorted set: reservations given back because their lease ended, kept for a day
                                 so that a late settlement is charged, and charged once

Counters in the hash: `r.` and `t.` are the windows of requests and tokens (`sum`, `first` and `last` slot,
and an amount for each slot); `td`, `tm`, `ud`, `um` are tokens and money by day and month, each with the
number of its period in `td.p` and so on. Numbers of Lua are doubles: amounts are exact up to 2^53, nine
million dollars.

The first argument of each script is the time in milliseconds, "" for the time of Redis itself: the clocks of
gateways differ, and one that is wrong must not open everybody's budget.
"""

from __future__ import annotations

_COMMON = """
local KEEP_S = 35 * 86400    -- longer than any period: a scope nobody uses leaves nothing behind
local GONE_MS = 86400000
local SLOTS = 60

local function now_ms()
  if ARGV[1] ~= '' then return tonumber(ARGV[1]) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function days_of(year)
  local leap = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)
  return leap and 366 or 365, leap and 29 or 28
end

local function month_of(day)
  local year = 1970
  local length, february = days_of(year)
  while day >= length do
    day = day - length
    year = year + 1
    length, february = days_of(year)
  end
  local month = 0
  for _, days in ipairs({31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}) do
    if day < days then break end
    day = day - days
    month = month + 1
  end
  return year * 12 + month
end

-- Where a reservation was charged: slot, day, month, tokens, nanousd, and which counters (letters).
local function read_place(text)
  local slot, day, month, tokens, nanousd, counted = string.match(text, '(%d+) (%d+) (%d+) (%d+) (%d+) (%a*)')
  return {slot = tonumber(slot), day = tonumber(day), month = tonumber(month), tokens = tonumber(tokens),
          nanousd = tonumber(nanousd), counted = counted}
end

-- The counters by day and month: name, letter, which period, which amount.
local PERIODS = {
  {'td', 'd', 'day', 'tokens'}, {'tm', 'm', 'month', 'tokens'},
  {'ud', 'u', 'day', 'nanousd'}, {'um', 'v', 'month', 'nanousd'},
}

local function charge_period(key, name, period, amount)
  local known = tonumber(redis.call('HGET', key, name .. '.p') or -1)
  if period > known then
    redis.call('HSET', key, name, amount, name .. '.p', period)
  elseif period == known and amount ~= 0 then
    redis.call('HINCRBY', key, name, amount)
  end
end

-- Charge (or give back) amounts to the slot and periods of a reservation. What is over is counted by nobody.
local function charge(key, place, tokens, nanousd)
  if tokens ~= 0 and string.find(place.counted, 't', 1, true) then
    local slot = string.format('t.%d', place.slot)
    if redis.call('HEXISTS', key, slot) == 1 then
      redis.call('HINCRBY', key, slot, tokens)
      redis.call('HINCRBY', key, 't.sum', tokens)
    end
  end
  for _, each in ipairs(PERIODS) do
    local amount = each[4] == 'tokens' and tokens or nanousd
    if amount ~= 0 and string.find(place.counted, each[2], 1, true) then
      charge_period(key, each[1], place[each[3]], amount)
    end
  end
end
"""

RESERVE = (
    _COMMON
    + """
-- KEYS: three for each scope. ARGV: now, id, tokens, nanousd, lease in ms, then seven limits for each scope.
local now = now_ms()
local id, tokens, nanousd = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local slot, day = math.floor(now / 1000), math.floor(now / 86400000)
local month = month_of(day)
local period_of = {day = day, month = month}
local claim_of = {tokens = tokens, nanousd = nanousd}

-- Give back what crashed gateways held; a bounded piece of it, the rest at the next reservation.
local function give_back(key, held, gone)
  local late = redis.call('ZRANGEBYSCORE', held, '-inf', now, 'LIMIT', 0, 500)
  if #late == 0 then return end
  for _, each in ipairs(late) do
    local text = redis.call('HGET', key, 'h.' .. each)
    if text then
      local place = read_place(text)
      charge(key, place, -place.tokens, -place.nanousd)
    end
    redis.call('ZREM', held, each)
    redis.call('ZADD', gone, now, each)
  end
  for _, each in ipairs(redis.call('ZRANGEBYSCORE', gone, '-inf', now - GONE_MS, 'LIMIT', 0, 1000)) do
    redis.call('ZREM', gone, each)
    redis.call('HDEL', key, 'h.' .. each)
  end
  redis.call('EXPIRE', gone, KEEP_S)
end

-- The sum of the last minute, without the slots that have left it.
local function window(key, name)
  local got = redis.call('HMGET', key, name .. '.sum', name .. '.first', name .. '.last')
  local sum, first, last = tonumber(got[1] or 0), tonumber(got[2] or slot), tonumber(got[3] or slot)
  local stop = math.min(slot - SLOTS - 1, last, first + 3999)
  if first <= stop then
    local fields = {}
    for each = first, stop do fields[#fields + 1] = name .. string.format('.%d', each) end
    for _, amount in ipairs(redis.call('HMGET', key, unpack(fields))) do
      if amount then sum = sum - amount end
    end
    redis.call('HDEL', key, unpack(fields))
    first = stop + 1
    if first > last then first = slot end
    redis.call('HSET', key, name .. '.sum', sum, name .. '.first', first)
  end
  return sum, first
end

local function wait_ms(key, name, first, need)
  for each = first, slot do
    need = need - tonumber(redis.call('HGET', key, name .. string.format('.%d', each)) or 0)
    if need <= 0 then return math.max(1, (each + SLOTS + 1) * 1000 - now) end
  end
  return 1000
end

local function add(key, name, amount)
  local got = redis.call('HMGET', key, name .. '.first', name .. '.last')
  redis.call('HINCRBY', key, name .. string.format('.%d', slot), amount)
  redis.call('HINCRBY', key, name .. '.sum', amount)
  redis.call('HSET', key, name .. '.first', math.min(tonumber(got[1] or slot), slot),
             name .. '.last', math.max(tonumber(got[2] or slot), slot))
end

-- The answer of a refusal: scope, limit, used, wait in ms (-1: it would not help), now.
for i = 1, #KEYS / 3 do
  local key, held, gone = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  local function limit(n) return tonumber(ARGV[5 + 7 * (i - 1) + n]) end
  give_back(key, held, gone)
  for n, each in ipairs({{'r', 1}, {'t', tokens}}) do
    local most, claim = limit(n), each[2]
    if most then
      local sum, first = window(key, each[1])
      if sum + claim > most then
        local wait = claim > most and -1 or wait_ms(key, each[1], first, sum + claim - most)
        return {0, i - 1, n - 1, sum, wait, now}
      end
    end
  end
  local most = limit(3)
  if most then
    local running = redis.call('ZCOUNT', held, '(' .. string.format('%d', now), '+inf')
    if running >= most then return {0, i - 1, 2, running, most > 0 and 1000 or -1, now} end
  end
  for n, each in ipairs(PERIODS) do
    local most, claim = limit(3 + n), claim_of[each[4]]
    if most then
      local got = redis.call('HMGET', key, each[1], each[1] .. '.p')
      -- A later period than now: the clock of Redis was set back. What is known of it holds.
      local used = tonumber(got[2] or -1) >= period_of[each[3]] and tonumber(got[1]) or 0
      if used + claim > most then return {0, i - 1, 2 + n, used, claim > most and -1 or 0, now} end
    end
  end
end

-- Nothing stands in the way: take from all.
local left = -1
for i = 1, #KEYS / 3 do
  local key, held = KEYS[3 * i - 2], KEYS[3 * i - 1]
  local function limit(n) return tonumber(ARGV[5 + 7 * (i - 1) + n]) end
  local counted = ''
  if limit(1) then add(key, 'r', 1) end
  if limit(2) then
    add(key, 't', tokens)
    counted = counted .. 't'
  end
  for n, each in ipairs(PERIODS) do
    local most = limit(3 + n)
    if most then
      charge_period(key, each[1], period_of[each[3]], claim_of[each[4]])
      counted = counted .. each[2]
      local share = most > 0 and 1 - redis.call('HGET', key, each[1]) / most or 0
      left = left < 0 and share or math.min(left, share)
    end
  end
  local place = string.format('%d %d %d ', slot, day, month) .. ARGV[3] .. ' ' .. ARGV[4] .. ' ' .. counted
  redis.call('HSET', key, 'h.' .. id, place)
  redis.call('ZADD', held, now + tonumber(ARGV[5]), id)
  redis.call('EXPIRE', key, KEEP_S)
  redis.call('EXPIRE', held, KEEP_S)
end
return {1, tostring(left)}
"""
)

SETTLE = (
    _COMMON
    + """
-- KEYS: three for each scope. ARGV: now, id, tokens, nanousd. Unknown: settled before, nothing to do.
local id, tokens, nanousd = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 1, #KEYS / 3 do
  local key, held, gone = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  local text = redis.call('HGET', key, 'h.' .. id)
  if text then
    local place = read_place(text)
    if redis.call('ZREM', held, id) == 1 then
      charge(key, place, tokens - place.tokens, nanousd - place.nanousd)
    elseif redis.call('ZREM', gone, id) == 1 then
      charge(key, place, tokens, nanousd)
    end
    redis.call('HDEL', key, 'h.' .. id)
  end
end
return 1
"""
)

RENEW = (
    _COMMON
    + """
-- KEYS: the held set of a scope. ARGV: now, lease in ms, ids. Those given back already stay so.
local ends = now_ms() + tonumber(ARGV[2])
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[i]) end
return 1
"""
)

REPORT = (
    _COMMON
    + """
-- KEYS: a mark, the hash of a scope. ARGV: now, day, tokens, nanousd, counted.
if not redis.call('SET', KEYS[1], '1', 'NX', 'EX', 86400) then return 0 end
local day = tonumber(ARGV[2])
local place = {slot = 0, day = day, month = month_of(day), counted = ARGV[5]}
charge(KEYS[2], place, tonumber(ARGV[3]), tonumber(ARGV[4]))
redis.call('EXPIRE', KEYS[2], KEEP_S)
return 1
"""
)
