-- One exchange of a node with the ledger: what it holds, uses and wants goes in, its shares come out.
--
-- The ledger keeps, for each quantity of each model, the sum of all shares within the limit, and counts a node that has
-- used more than its share by its use. It holds no windows: these are the nodes'. A share that a node has lowered is
-- free at once; that of a node that has died stays taken until what it may have admitted has aged out everywhere (its
-- end of lease, and the quantity's hold). Nothing is granted for one lease after the server's memory may have been lost.
--
-- Everything is computed first and written afterwards, what allocates memory first, since nothing is rolled back if a
-- command fails. Numbers are doubles: integers up to 2^53, written by text(), since tostring() keeps 14 digits only.
-- What has many numbers is a JSON array of integers: decoding one takes a tenth of the time of taking a text apart.
--
-- KEYS  <base>meta, <base>nodes, <base>ghosts, <base>node:<id>, and <base>m:<model> of each model
-- ARGV  format, verb (exchange or leave), id, number, token, nonce, boot, boot_ms, lease_ms, since, and of each model
--       its limits  "code;version;[limit,hold_ms,...]" with a limit of -1 for none; they replace those of the ledger
--                   that are of this version; with -1 the share is given up. The code is that of the model on its
--                   host: what a share of another code took is handed over
--       holdings    [held,used,want,need,...] of each quantity
--       ghosts      "quantity:amount:hold_ms,...": what was used by a share that is given up in this exchange
--       Since, if it is not 0, is the number of a request: the node has no other models than those it named since then.
--       To publish quotas: format, publish, text; KEYS[4] is <base>quotas. To forget a dead node: the verb forget.
-- Reply a status alone (stale, fenced, format), or lines: status, nonce, generation, milliseconds of learning left,
--       live nodes, version of the published quotas, boot_ms of the request that was executed, 1 if models are left
--       that the node has no more, or 0; and of each model [version,share,target,free,idle,...], with a share of -1 for a
--       quantity without a limit, and its limits behind a ; if they are others. Idle is what dead nodes hold and had
--       not used.
--       After publish the version; after forget one of forgotten, unknown, live.
--
-- meta        format, run (the server's run_id), generation, learning (until), clock, raw (of TIME at that clock), lease,
--             quotas (the version of those published), deaths (how often a node or its ghost began or ended)
-- quotas      version and text of what was published; the script does not read it
-- nodes       id -> end of lease, of live nodes
-- node:<id>   number, token, nonce and reply of the last request; generation; boot, base (clock - boot_ms at least);
--             holds; a field m:<model> for each model in which it has a share, the number of the last request that named it;
--             of a dead one pass (see end_shares)
-- m:<model>   limits, version, claim; sums [records, sum, lent, ...]: of all shares and ghosts, and of these what was
--             handed over; fair [at, deaths, level, filled, used, idle, ...], a hint only: see fair_of; a field n:<id>
--             [generation,held,used,want,...,code] for each node
-- ghosts      release time -> d:<hold_ms>:<id> shares of a dead node, e:<id> the end of its record,
--             h:<quantity>:<amount>:<generation>:<number>:<id>:<model> what was handed over

local FORMAT = '1'
local SLACK_MS = 400      -- by how much the server's clock may outrun a node's
local CLAIM_MS = 3000     -- a claim that is not repeated lapses
local FAIR_MS = 100       -- how long a fair share is used at least before it is computed again, and 1 ms for each node
local READ = 2000         -- after that many records one exchange goes by the fair shares that there are
local SLICES = 32         -- the smallest slice is the limit / (SLICES * nodes)
local BURIED = 16         -- dead nodes of which one exchange makes ghosts at most
local SWEPT = 256         -- models of dead nodes, and amounts that were handed over, that one exchange frees at most

local INTEGER = string.format('%d', 2 ^ 53) == '9007199254740992' and '%d' or '%.0f' -- the first is faster, if exact

local call = redis.call
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local function text(number)
  return string.format(INTEGER, number)
end

local formats = {}

local function encoded(values, count) -- as a JSON array
  local format = formats[count]
  if not format then
    format = '[' .. string.sub(string.rep(INTEGER .. ',', count), 1, -2) .. ']'
    formats[count] = format
  end
  return string.format(format, unpack(values, 1, count))
end

local function decoded(line)
  return line and cjson.decode(line)
end

local base = string.sub(KEYS[1], 1, -5)
local meta_key, nodes_key, ghosts_key, node_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local verb, id, number, token, nonce = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local boot, boot_ms, lease_ms = ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
if ARGV[1] ~= FORMAT then
  return 'format'
end

-- What is written at the end.
local sets, deletes, adds, removes, ends = {}, {}, {}, {}, {}

local function put(list, key, first, second)
  local values = list[key]
  if not values then
    values = {}
    list[key] = values
  end
  values[#values + 1] = first
  values[#values + 1] = second
end

local function apply()
  local function each(command, list)
    for key, values in pairs(list) do
      for first = 1, #values, 1000 do
        call(command, key, unpack(values, first, min(first + 999, #values)))
      end
    end
  end
  each('HSET', sets)
  each('ZADD', adds)
  each('HDEL', deletes)
  each('ZREM', removes)
  for key in pairs(ends) do
    call('DEL', key)
  end
end

-- The request is of the node that has this id, and neither a duplicate nor out of order.
local meta = call('HMGET', meta_key, 'format', 'run', 'generation', 'learning', 'clock', 'raw', 'lease', 'quotas',
                  'deaths')
if meta[1] and meta[1] ~= FORMAT then
  return 'format'
end
local time = call('TIME')
local microseconds = tonumber(time[1]) * 1000000 + tonumber(time[2])
if verb == 'publish' then -- the version is by the time: a ledger that was lost does not use one again
  local version = text(max((tonumber(meta[8]) or 0) + 1, microseconds))
  call('HSET', node_key, 'version', version, 'text', id)
  call('HSET', meta_key, 'quotas', version)
  return version
end
local run = string.match(call('INFO', 'server'), 'run_id:(%w+)') or ''
local fresh = not meta[1]                   -- an empty ledger
local relearns = fresh or meta[2] ~= run    -- a server that may have forgotten something
local generation = tonumber(meta[3]) or 0
if relearns then -- by the time, since an empty ledger cannot count its generations
  generation = max(generation + 1, microseconds)
end

local node = call('HMGET', node_key, 'number', 'token', 'nonce', 'generation', 'boot', 'base', 'holds', 'reply')
if node[1] and verb ~= 'forget' then
  local last = tonumber(node[1])
  if number < last then
    return 'stale'
  end
  if number == last and token ~= node[2] then
    return 'fenced'
  end
  if number == last then
    call('HSET', node_key, 'number', node[1]) -- as it is: WAIT waits only for what its own connection has written
    return node[8]
  end
  if tonumber(node[4]) == generation and node[3] ~= nonce then
    return 'fenced'
  end
end

-- The ledger's clock. It never goes back, and advances by what the server's wall clock does, but no further than the
-- clock of a node confirms: a wall clock that jumps ends no lease. What only a newcomer sees is not confirmed.
local raw = tonumber(time[1]) * 1000 + floor(tonumber(time[2]) / 1000)
local clock, last_raw = tonumber(meta[5]) or raw, tonumber(meta[6]) or raw
local now = clock + max(0, raw - last_raw)
local unconfirmed = now
local clock_base = node[5] == boot and tonumber(node[6])
if clock_base then
  now = min(now, boot_ms + clock_base + SLACK_MS)
elseif call('ZCOUNT', nodes_key, text(clock), '+inf') > 0 then
  now = clock
  -- If it learns from here on, what has passed unseen is left out: confirmed later, it would end the learning at once.
  raw = raw >= last_raw and not relearns and last_raw or raw
end
now = max(now, clock)
clock_base = clock_base and min(clock_base, now - boot_ms) or now - boot_ms

local learning_until = tonumber(meta[4]) or 0
local longest_ms = max(lease_ms, tonumber(meta[7]) or 0)
if relearns then
  learning_until = now + longest_ms
end
local learning = now < learning_until
local nodes_count = call('ZCARD', nodes_key)
local deaths = tonumber(meta[9]) or 0

-- Models: what the ledger knows of each, read once.
local models = {}

local function set_limits(of, line)
  local pairs_of = decoded(line)
  of.line, of.count, of.limits, of.holds = line, #pairs_of / 2, {}, {}
  for i = 1, of.count do
    local limit = pairs_of[2 * i - 1]
    of.limits[i], of.holds[i] = limit >= 0 and limit, pairs_of[2 * i]
  end
end

local function model(name)
  local known = models[name]
  if known then
    return known
  end
  local key = base .. 'm:' .. name
  local stored = call('HMGET', key, 'limits', 'version', 'sums', 'fair', 'claim', 'n:' .. id)
  known = {name = name, key = key, version = tonumber(stored[2]) or 0, sums = decoded(stored[3]) or {0},
           fair = decoded(stored[4]) or nil, claim = stored[5] or nil, nodes = {[id] = decoded(stored[6])}}
  if stored[1] then
    set_limits(known, stored[1])
  end
  models[name] = known
  return known
end

-- A record is {generation, held, used, want, ..., code}, three for each quantity.
local function record_of(of, who)
  local known = of.nodes[who]
  if known == nil then
    known = decoded(call('HGET', of.key, 'n:' .. who))
    of.nodes[who] = known
  end
  return known
end

local function taken(record, quantity)
  return max(record[3 * quantity - 1] or 0, record[3 * quantity] or 0)
end

local function lent(of, quantity)
  return of.sums[2 * quantity + 1] or 0
end

local function release(of, quantity, amount)
  of.sums[2 * quantity] = max(0, (of.sums[2 * quantity] or 0) - amount)
  of.changed = true
end

-- Dead nodes and their ghosts. A share is not moved when its node dies: it stays in the model's sums until its release.
local function bury(who, ended, holds)
  local latest = 0
  deaths = deaths + 1
  for _, hold in ipairs(decoded(holds) or {}) do
    put(adds, ghosts_key, text(ended + hold), 'd:' .. text(hold) .. ':' .. who)
    latest = max(latest, hold)
  end
  put(adds, ghosts_key, text(ended + latest + longest_ms), 'e:' .. who)
  put(removes, nodes_key, who)
end

local function drop(of, who) -- a model's record of a node
  of.nodes[who], of.left = false, true
  of.sums[1] = of.sums[1] - 1
  put(deletes, of.key, 'n:' .. who)
end

local function end_share(who, name, due) -- in one model: of the holds that are due or, without them, all that is left
  local of = model(name)
  local record = record_of(of, who)
  if record and of.count then
    for i = 1, of.count do
      local amount = taken(record, i)
      if amount > 0 and (not due or due[of.holds[i]]) then
        release(of, i, amount)
        record[3 * i - 1], record[3 * i], record[3 * i + 1] = 0, 0, 0
        record.changed = true
      end
    end
    if not due then
      drop(of, who)
    end
  end
end

-- All shares of a dead node of these holds end, or, without them, all that is left and its record. Of many models it
-- takes several exchanges, with `pass` saying how far they have come, or with the models that are done left out.
-- Returns how much of the work that was left for this exchange still is, and the holds that have ended.
local function end_shares(who, holds, left)
  local key, cursor, due = base .. 'node:' .. who, '0', nil
  if holds then
    local pass = call('HGET', key, 'pass')
    if pass then
      cursor, holds = string.match(pass, '^(%d+);(.*)$')
      holds = decoded(holds)
    end
    due = {}
    for _, hold in ipairs(holds) do
      due[hold] = true
    end
  end
  deaths = deaths + 1
  repeat
    local found = call('HSCAN', key, cursor, 'MATCH', 'm:*', 'COUNT', text(min(left, SWEPT)))
    cursor = found[1]
    for at = 1, #found[2], 2 do
      end_share(who, string.sub(found[2][at], 3), due)
      if not due then
        put(deletes, key, found[2][at])
      end
      left = left - 1
    end
  until cursor == '0' or left <= 0
  local is_done = cursor == '0'
  if not due then
    ends[key] = is_done or nil
  elseif is_done then
    put(deletes, key, 'pass')
  else
    put(sets, key, 'pass', cursor .. ';' .. encoded(holds, #holds))
  end
  return left, is_done and (holds or {})
end

local function end_lent(ghost) -- what was handed over
  local quantity, amount, name = string.match(ghost, '^h:(%d+):(%d+):%d+:%d+:[^:]*:(.*)$')
  quantity, amount = tonumber(quantity), tonumber(amount)
  local of = model(name)
  release(of, quantity, amount)
  of.sums[2 * quantity + 1] = max(0, lent(of, quantity) - amount)
  of.left = true
  put(removes, ghosts_key, ghost)
end

for _, due in ipairs(call('ZRANGEBYSCORE', nodes_key, '-inf', '(' .. text(now), 'LIMIT', 0, BURIED)) do
  if due ~= id then
    local holds = call('HGET', base .. 'node:' .. due, 'holds')
    bury(due, tonumber(call('ZSCORE', nodes_key, due)), holds)
  end
end
local left, dead, due_of = SWEPT, {}, {}
for _, due in ipairs(call('ZRANGEBYSCORE', ghosts_key, '-inf', '(' .. text(now), 'LIMIT', 0, SWEPT)) do
  if string.sub(due, 1, 1) == 'h' then
    end_lent(due)
    left = left - 1
  else
    local hold, who = string.match(due, '^d:(%d+):(.*)$')
    who = who or string.sub(due, 3)
    if who ~= id then -- the node that calls resumes what is left of its shares
      if not due_of[who] then
        dead[#dead + 1], due_of[who] = who, {}
      end
      if hold then
        put(due_of, who, tonumber(hold))
      else
        due_of[who].ends = due
      end
    end
  end
end
for _, who in ipairs(dead) do
  if left > 0 then
    local holds, ended = due_of[who], nil
    left, ended = end_shares(who, not holds.ends and holds, left)
    if ended and holds.ends then
      put(removes, ghosts_key, holds.ends)
      ended = holds
    end
    for _, hold in ipairs(ended or {}) do
      put(removes, ghosts_key, 'd:' .. text(hold) .. ':' .. who)
    end
  end
end

local function is_empty(of)
  for i = 1, of.count do
    if (of.sums[2 * i] or 0) > 0 then
      return false
    end
  end
  return true
end

local function write_models()
  for _, of in pairs(models) do
    if of.left and is_empty(of) then
      sets[of.key] = nil
      ends[of.key] = true
    elseif of.changed and of.count then
      put(sets, of.key, 'sums', encoded(of.sums, 1 + 2 * of.count))
      if of.new_limits then
        put(sets, of.key, 'limits', of.line)
        put(sets, of.key, 'version', text(of.version))
      end
      if of.fair then
        put(sets, of.key, 'fair', encoded(of.fair, 2 + 4 * of.count))
      elseif of.new_limits then
        put(deletes, of.key, 'fair')
      end
      if type(of.claim) == 'table' then
        local claim = of.claim
        put(sets, of.key, 'claim', text(claim.quantity) .. ':' .. text(claim.need) .. ':' .. text(claim.seen) .. ':'
            .. claim.id)
      elseif of.claim == false then
        put(deletes, of.key, 'claim')
      end
    end
    for who, record in pairs(ends[of.key] and {} or of.nodes) do
      if record and record.changed then
        put(sets, of.key, 'n:' .. who, encoded(record, 2 + 3 * of.count))
      end
    end
  end
end

-- A dead node is forgotten: what it held is free at once, whatever it has admitted. Who asks for it answers for that:
-- whether its lease has ended is told from the wall clock, since there may be no other node that could confirm it.
if verb == 'forget' then
  local lease_end = tonumber(call('ZSCORE', nodes_key, id))
  if lease_end and lease_end >= unconfirmed then
    return 'live'
  end
  local known, swept = node[1] and true, {}
  for _, ghost in ipairs(removes[ghosts_key] or {}) do
    swept[ghost] = true
  end
  end_shares(id, nil, math.huge)
  for _, ghost in ipairs(call('ZRANGE', ghosts_key, 0, -1)) do
    local who = string.match(ghost, '^h:%d+:%d+:%d+:%d+:([^:]*):')
    if who == id and not swept[ghost] then
      end_lent(ghost)
      known = true
    elseif not who and string.match(ghost, '^d:%d+:(.*)$') == id or ghost == 'e:' .. id then
      known = true
      put(removes, ghosts_key, ghost)
    end
  end
  put(removes, nodes_key, id)
  write_models()
  put(sets, meta_key, 'deaths', text(deaths))
  apply()
  return known and 'forgotten' or 'unknown'
end

-- This node's own ghosts end, if it has any: it is here again.
local holds, returns = {}, verb == 'exchange' and node[1] and not call('ZSCORE', nodes_key, id)
for _, hold in ipairs(decoded(node[7]) or {}) do
  holds[hold] = true
  if returns then
    put(removes, ghosts_key, 'd:' .. text(hold) .. ':' .. id)
  end
end
if returns then
  deaths = deaths + 1
  put(removes, ghosts_key, 'e:' .. id)
  put(deletes, node_key, 'pass')
end

-- The fair share of each quantity whose wants exceed it: the highest level such that no node gets more than it wants or
-- less than it uses, and everybody else the level (max-min fairness). Shares of the dead count as they are. If more is
-- used than there is, such as after a limit was lowered, nodes get less than they use, too.
local function water_level(available, floors, wants, highest, guess)
  local low, high, level = 0, highest, guess -- filled to high it is too much
  while true do
    if level <= low or level >= high then
      level = low + floor((high - low) / 2)
    end
    local filled, rising = 0, 0
    for i = 1, #floors do
      local least, want = floors[i], wants[i]
      if level >= want then
        filled = filled + want
      elseif level >= least then
        filled, rising = filled + level, rising + 1
      else
        filled = filled + least
      end
    end
    if filled > available then
      if level == 0 then
        return 0, filled
      end
      high, level = level, level - ceil((filled - available) / max(1, rising))
    elseif filled + rising > available then
      return level, filled
    else
      low, level = level, level + floor((available - filled) / max(1, rising))
    end
  end
end

local records_read = 0

local function compute_fair(of)
  local last = of.fair or {}
  local fair = {now, deaths}
  of.fair, of.changed = fair, true
  local alive = {[id] = true}
  for _, who in ipairs(call('ZRANGE', nodes_key, 0, -1)) do
    alive[who] = true
  end
  for _, who in ipairs(removes[nodes_key] or {}) do
    alive[who] = nil
  end
  local fields = call('HGETALL', of.key)
  for at = 1, #fields, 2 do
    local field = fields[at]
    if string.sub(field, 1, 2) == 'n:' and of.nodes[string.sub(field, 3)] == nil then
      of.nodes[string.sub(field, 3)] = cjson.decode(fields[at + 1])
    end
  end
  local records, count = {}, 0
  for who, record in pairs(of.nodes) do
    if record then
      count = count + 1
      records[count], record.is_live, record.claims = record, alive[who], of.claim and of.claim.id == who
    end
  end
  records_read = records_read + count
  for i = 1, of.count do
    local limit = of.limits[i]
    local level, filled, used, idle = 0, 0, 0, 0
    if limit then
      local floors, wants, highest = {}, {}, 0
      for place = 1, count do
        local record = records[place]
        local least, most = record[3 * i] or 0, 0
        if record.is_live then
          most = min(record[3 * i + 1] or 0, limit)
        else
          local held = max(least, record[3 * i - 1] or 0)
          least, idle = held, idle + held - least
        end
        used = used + least
        if record.claims and of.claim.quantity == i then
          least = max(least, of.claim.need)
        end
        most = max(most, least)
        floors[place], wants[place], filled, highest = least, most, filled + most, max(highest, most)
      end
      local available = limit - lent(of, i)
      level = limit -- which is none
      if filled > available then
        local uncut = used > available and floors
        if uncut then -- more is used than there is: shares fall below use, so that all of it ages out
          floors = {}
          for place = 1, count do
            floors[place] = records[place].is_live and 0 or uncut[place]
          end
        end
        level, filled = water_level(available, floors, wants, highest, last[4 * i - 1] or floor(available / count))
        if uncut then
          filled = 0
          for place = 1, count do
            filled = filled + max(uncut[place], min(wants[place], level))
          end
        end
      end
    end
    fair[4 * i - 1], fair[4 * i], fair[4 * i + 1], fair[4 * i + 2] = level, filled, used, idle
  end
end

-- The levels are computed again, which reads the records of all nodes, if a node has died or returned, or if what nodes
-- would have at these levels (kept up to date by each exchange) is more or less than there is. Nothing but fairness
-- depends on them: what is granted is within what is free.
local function fair_of(of)
  local fair = of.fair
  if not fair then
    compute_fair(of)
  elseif now - fair[1] >= max(FAIR_MS, nodes_count) and records_read < READ then
    local is_off = fair[2] ~= deaths
    for i = 1, of.count do
      local limit = of.limits[i]
      if limit then
        local available = limit - lent(of, i)
        local excess = fair[4 * i] - available
        is_off = is_off or excess > available / 100
            or fair[4 * i - 1] < limit and -excess > max(available / 100, nodes_count)
      end
    end
    if is_off then
      compute_fair(of)
    end
  end
  return of.fair
end

local function end_claim(of)
  of.claim, of.changed = false, true
  if of.fair then
    of.fair[2] = -1 -- its need was a floor
  end
end

local function claim_of(of)
  if type(of.claim) == 'string' then
    local quantity, need, seen, who = string.match(of.claim, '^(%d+):(%d+):(%d+):(.*)$')
    of.claim = {quantity = tonumber(quantity), need = tonumber(need), seen = tonumber(seen), id = who}
  end
  local claim = of.claim
  if claim and (now - claim.seen > CLAIM_MS or claim.id ~= id and not call('ZSCORE', nodes_key, claim.id)) then
    end_claim(of)
  end
end

-- Each model of the request.
local lines = {}

local function settle(of, code, ask, ghosts)
  local record = record_of(of, id)
  local trusted = learning and not (record and record[1] == generation)
  local sums, fair, after, is_idle = of.sums, of.fair, {generation}, true
  for i = 1, of.count do
    local place = 3 * i - 1
    local held, used, want = ask[4 * i - 3] or 0, ask[4 * i - 2] or 0, ask[4 * i - 1] or 0
    local last_held, last_used, last_want = 0, 0, 0
    if record then
      last_held, last_used, last_want = record[place] or 0, record[place + 1] or 0, record[place + 2] or 0
    end
    if not trusted then -- it holds no more than the ledger says
      held = min(held, last_held)
    end
    want = max(want, used)
    after[place], after[place + 1], after[place + 2] = held, used, want
    sums[2 * i] = (sums[2 * i] or 0) - max(last_held, last_used) + max(held, used)
    sums[2 * i + 1] = sums[2 * i + 1] or 0
    is_idle = is_idle and held == 0 and want == 0
    if fair then
      local level = fair[4 * i - 1]
      fair[4 * i] = max(0, fair[4 * i] + max(used, min(want, level)) - max(last_used, min(last_want, level)))
      fair[4 * i + 1] = max(0, fair[4 * i + 1] + used - last_used)
    end
  end
  if not record then
    sums[1] = sums[1] + 1
  end
  put(sets, node_key, 'm:' .. of.name, text(number))
  after[3 * of.count + 2], after.changed = code, true
  of.nodes[id], of.changed = after, true
  for quantity, amount, hold in string.gmatch(ghosts, '(%d+):(%d+):(%d+)') do
    quantity, amount = tonumber(quantity), tonumber(amount)
    sums[2 * quantity] = (sums[2 * quantity] or 0) + amount
    sums[2 * quantity + 1] = (sums[2 * quantity + 1] or 0) + amount
    put(adds, ghosts_key, text(now + hold),
        table.concat({'h', text(quantity), text(amount), text(hold), text(number), id, of.name}, ':'))
  end
  return after, is_idle
end

local function hand_over(of, record) -- all that the share took: it is not known what of it has been used
  local ghosts = {}
  for i = 1, of.count do
    if taken(record, i) > 0 then
      ghosts[#ghosts + 1] = table.concat({text(i), text(taken(record, i)), text(of.holds[i])}, ':')
    end
  end
  settle(of, record[3 * of.count + 2], {}, table.concat(ghosts, ','))
end

local function nodes_of(of) -- that have a record of the model, at most those that live
  return max(1, min(of.sums[1], nodes_count))
end

local function smallest_slice(of, i)
  return ceil(of.limits[i] / (SLICES * nodes_of(of)))
end

local function target_of(of, own, i) -- what is left of the division goes to those who ask first
  local level, limit = of.fair[4 * i - 1], of.limits[i]
  local is_short = level < limit or of.claim and of.claim.quantity == i or limit - of.sums[2 * i] < smallest_slice(of, i)
  if own[3 * i + 1] <= own[3 * i] and not is_short then -- what it keeps for a first request
    return max(own[3 * i - 1], own[3 * i])
  end
  if of.sums[2 * i] > limit and of.fair[4 * i + 1] > limit - lent(of, i) then
    return min(own[3 * i + 1], level)
  end
  local spare = (level >= limit or of.claim and of.claim.quantity == i) and 0 or 1
  return max(own[3 * i], min(own[3 * i + 1], level + spare))
end

local function grow(of, own, ask)
  claim_of(of)
  fair_of(of)
  local sums = of.sums
  for i = 1, of.count do
    local limit = of.limits[i]
    if limit then
      local place = 3 * i - 1
      local free = limit - sums[2 * i]
      local claim = of.claim and of.claim.quantity == i and of.claim
      if claim and claim.id ~= id then
        local other = record_of(of, claim.id)
        free = free - max(0, claim.need - (other and other[place] or 0))
      end
      local held = own[place]
      local count = max(held, own[place + 1])
      local need, target = min(ask[4 * i] or 0, limit), target_of(of, own, i)
      local step = target - count
      if of.fair[4 * i - 1] >= limit then
        step = min(step, max(smallest_slice(of, i), floor(free / (2 * nodes_of(of)))))
      end
      if need > held then -- a request that no smaller share admits: all that it takes, or a claim to it
        local own_claim = claim and claim.id == id
        if free >= need - count then
          step = max(step, need - count)
          if own_claim then
            end_claim(of)
          end
        elseif own_claim then
          claim.seen, claim.need = now, need
        elseif not of.claim then
          local others = of.fair[4 * i + 1] - own[place + 1]
          if need <= limit - lent(of, i) - others then
            of.claim = {quantity = i, need = need, seen = now, id = id}
            compute_fair(of) -- the share of the others falls
          end
        end
      elseif claim and claim.id == id then
        end_claim(of)
      end
      if free >= 0 then
        own[place] = max(held, min(target, count))
        step = min(step, free)
        if step > 0 then
          own[place] = count + step
          sums[2 * i] = sums[2 * i] + step
        end
      end
    end
  end
end

local function drop_own(of)
  drop(of, id)
  put(deletes, node_key, 'm:' .. of.name)
end

local named = {}
for at = 11, #ARGV, 3 do
  local key = KEYS[5 + (at - 11) / 3]
  local of = model(string.sub(key, #base + 3))
  named[of.name] = true
  local code, version, limits = string.match(ARGV[at], '^(%d+);(-?%d+);(.*)$')
  if not of.line or (tonumber(version) == of.version and of.line ~= limits) then
    set_limits(of, limits) -- the version is by the time: one is not used again
    of.version, of.fair, of.new_limits = max(of.version + 1, microseconds), nil, true
  end
  code = tonumber(code)
  local ask, own, is_idle = cjson.decode(ARGV[at + 1]), record_of(of, id), false
  local is_other, gives_up = own and own[3 * of.count + 2] ~= code, version == '-1'
  if not (is_other and gives_up) then -- otherwise it has been handed over
    if is_other then
      hand_over(of, own)
    end
    own, is_idle = settle(of, code, ask, ARGV[at + 2])
  end
  local grows = verb == 'exchange' and not learning and not gives_up
  if grows then
    grow(of, own, ask)
  end
  local answer = {of.version}
  for i = 1, of.count do
    local place, limit, held = 4 * i - 2, of.limits[i], own[3 * i - 1]
    if limit then
      answer[place], is_idle = held, is_idle and held == 0
      answer[place + 1] = grows and min(held, target_of(of, own, i)) or held
      answer[place + 2] = max(0, limit - of.sums[2 * i])
      answer[place + 3] = grows and of.fair[4 * i + 2] or 0
      holds[of.holds[i]] = true
    else
      answer[place], answer[place + 1], answer[place + 2], answer[place + 3] = -1, 0, 0, 0
    end
  end
  local line = encoded(answer, 1 + 4 * of.count)
  if limits ~= of.line then
    line = line .. ';' .. of.line
  end
  lines[#lines + 1] = line
  if is_idle and not is_other then -- the record says that the one of another code has been handed over
    drop_own(of)
  end
end

-- Models that the node had before it was started again, and has no more: some of them in each exchange.
local since, unended = tonumber(ARGV[10]) or 0, SWEPT
local fields = since > 0 and call('HGETALL', node_key) or {}
for at = 1, #fields, 2 do
  local name = string.match(fields[at], '^m:(.*)$')
  if name and not named[name] and (tonumber(fields[at + 1]) or 0) < since then
    unended = unended - 1
    if unended < 0 then
      break
    end
    local of = model(name)
    local record = record_of(of, id)
    if record and of.count then
      hand_over(of, record)
      drop_own(of)
    else
      put(deletes, node_key, 'm:' .. name)
    end
  end
end

-- What has changed is written, and the reply kept for a repeated request.
write_models()
local kept = {}
for hold in pairs(holds) do
  kept[#kept + 1] = hold
end
table.sort(kept)
local held_for = encoded(kept, #kept)
local next_nonce = redis.sha1hex(table.concat({nonce, token, id, text(number), time[1], time[2], run}, ':'))
local reply = table.concat({learning and 'learning' or 'ok', next_nonce, text(generation),
  text(max(0, learning_until - now)), text(nodes_count), meta[8] or '0', text(boot_ms), unended < 0 and '1' or '0',
  table.concat(lines, '\n')}, '\n')
for _, pair in ipairs({{'number', text(number)}, {'token', token}, {'nonce', next_nonce}, {'boot', boot},
                       {'generation', text(generation)}, {'base', text(clock_base)}, {'holds', held_for},
                       {'reply', reply}}) do
  put(sets, node_key, pair[1], pair[2])
end
if verb == 'leave' then
  bury(id, now, held_for)
else
  put(adds, nodes_key, text(now + lease_ms), id)
end
for _, pair in ipairs({{'format', FORMAT}, {'run', run}, {'generation', text(generation)}, {'clock', text(now)},
                       {'learning', text(learning_until)}, {'raw', text(raw)}, {'lease', text(longest_ms)},
                       {'deaths', text(deaths)}}) do
  put(sets, meta_key, pair[1], pair[2])
end
apply()
return reply
