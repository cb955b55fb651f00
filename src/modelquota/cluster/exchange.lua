-- One exchange of a node with the ledger: what it holds, uses and wants goes in, its shares come out.
--
-- The ledger keeps, for each quantity of each model, the sum of all shares within the limit, and counts a node that has
-- used more than its share by its use. It holds no windows: these are the nodes'. A share that a node has lowered is
-- free at once; that of a node that has died stays taken until what it may have admitted has aged out everywhere (its
-- end of lease, and the quantity's hold). Nothing is granted for one lease after the server's memory may have been lost.
--
-- Everything is computed first and written afterwards, what allocates memory first, since nothing is rolled back if a
-- command fails. Numbers are doubles: integers up to 2^53, written by text(), since tostring() keeps 14 digits only.
--
-- KEYS  <base>meta, <base>nodes, <base>ghosts, <base>node:<id>, and <base>m:<model> of each model
-- ARGV  format, verb (exchange or leave), id, number, token, nonce, boot, boot_ms, lease_ms, and of each model
--       its limits  "version;limit:hold_ms,..." with - for none; the version is that of the ledger, 0 to change it
--       holdings    "held:used:want:need,..." with - for a quantity without a limit
--       ghosts      "quantity:amount:hold_ms,...": what was used by a share that is given up in this exchange
--       To publish quotas: format, publish, text; KEYS[4] is <base>quotas. To forget a dead node: the verb forget.
-- Reply a status alone (stale, fenced, format), or lines: status, nonce, generation, milliseconds of learning left,
--       live nodes, version of the published quotas; and of each model "version;share:target:free:idle,...", with its
--       limits behind another ; if they are others. Idle is what dead nodes hold and had not used.
--       After publish the version; after forget one of forgotten, unknown, live.
--
-- meta        format, run (the server's run_id), generation, learning (until), clock, raw (of TIME at that clock), lease,
--             quotas (the version of those published)
-- quotas      version and text of what was published; the script does not read it
-- nodes       id -> end of lease, of live nodes
-- node:<id>   number, token, nonce and reply of the last request; generation; boot, base (clock - boot_ms at least);
--             holds; a field m:<model> for each model in which it has a share
-- m:<model>   limits, version; sums (of all shares and ghosts), lent (of these, ghosts handed over); fair, claim;
--             a field n:<id> "generation;held:used:want:need,..." for each node (- if all are 0)
-- ghosts      release time -> d:<hold_ms>:<id> shares of a dead node, e:<id> the end of its record,
--             h:<quantity>:<amount>:<generation>:<number>:<id>:<model> what was handed over

local FORMAT = '1'
local SLACK_MS = 400      -- by how much the server's clock may outrun a node's
local CLAIM_MS = 3000     -- a claim that is not repeated lapses
local FAIR_MS = 100       -- how long a fair share is used before it is computed again, and at least 1 ms for each node
local SLICES = 32         -- the smallest slice is the limit / (SLICES * nodes)
local SWEPT = 16          -- dead nodes and ghosts that one exchange clears away at most

local call = redis.call
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local function text(number)
  return string.format('%.0f', number)
end

local function split(line, separator)
  local parts, count = {}, 0
  for part in string.gmatch(line, '[^' .. separator .. ']+') do
    count = count + 1
    parts[count] = part
  end
  return parts, count
end

local function numbers(line)
  local parts, count = split(line or '', ',')
  for i = 1, count do
    parts[i] = tonumber(parts[i]) or false
  end
  return parts
end

local function joined(values, count)
  local parts = {}
  for i = 1, count do
    parts[i] = values[i] and text(values[i]) or '-'
  end
  return table.concat(parts, ',')
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

local function put(list, key, ...)
  local values = list[key]
  if not values then
    values = {}
    list[key] = values
  end
  for i = 1, select('#', ...) do
    values[#values + 1] = (select(i, ...))
  end
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
local meta = call('HMGET', meta_key, 'format', 'run', 'generation', 'learning', 'clock', 'raw', 'lease', 'quotas')
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
  if number == last then
    return token == node[2] and node[8] or 'fenced'
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

-- Models: what the ledger knows of each, read once.
local models = {}

local function set_limits(of, line)
  local parts, count = split(line, ',')
  of.line, of.count, of.limits, of.holds = line, count, {}, {}
  for i = 1, count do
    local limit, hold = string.match(parts[i], '^(%d+):(%d+)$')
    of.limits[i], of.holds[i] = tonumber(limit) or false, tonumber(hold) or 0
  end
end

local function model(name)
  local known = models[name]
  if known then
    return known
  end
  local key = base .. 'm:' .. name
  local stored = call('HMGET', key, 'limits', 'version', 'sums', 'lent', 'fair', 'claim')
  known = {name = name, key = key, line = stored[1] or nil, version = tonumber(stored[2]) or 0, sums = numbers(stored[3]),
           lent = numbers(stored[4]), fair = stored[5] or nil, claim = stored[6] or nil, nodes = {}}
  if known.line then
    set_limits(known, known.line)
  end
  models[name] = known
  return known
end

local function read_record(line)
  local own, rest = string.match(line, '^(%d+);(.*)$')
  local parts, count = split(rest, ',')
  local record = {generation = tonumber(own), held = {}, used = {}, want = {}, need = {}}
  for i = 1, count do
    record.held[i], record.used[i], record.want[i], record.need[i] = 0, 0, 0, 0
    if parts[i] ~= '-' then
      local h, u, w, n = string.match(parts[i], '^(%d+):(%d+):(%d+):(%d+)$')
      record.held[i], record.used[i], record.want[i], record.need[i] = tonumber(h), tonumber(u), tonumber(w), tonumber(n)
    end
  end
  return record
end

local function record_of(of, who)
  local known = of.nodes[who]
  if known == nil then
    local line = call('HGET', of.key, 'n:' .. who)
    known = line and read_record(line)
    of.nodes[who] = known
  end
  return known
end

local function taken(record, quantity)
  return max(record.held[quantity] or 0, record.used[quantity] or 0)
end

local function release(of, quantity, amount)
  of.sums[quantity] = max(0, (of.sums[quantity] or 0) - amount)
  of.changed = true
end

-- Dead nodes and their ghosts. A share is not moved when its node dies: it stays in the model's sums until its release.
local function bury(who, ended, holds)
  local latest = 0
  for _, hold in ipairs(numbers(holds)) do
    put(adds, ghosts_key, text(ended + hold), 'd:' .. text(hold) .. ':' .. who)
    latest = max(latest, hold)
  end
  put(adds, ghosts_key, text(ended + latest + longest_ms), 'e:' .. who)
  put(removes, nodes_key, who)
end

local function end_shares(who, hold) -- of one hold, or, without it, all that is left
  local key = base .. 'node:' .. who
  for _, field in ipairs(call('HKEYS', key)) do
    if string.sub(field, 1, 2) == 'm:' then
      local of = model(string.sub(field, 3))
      local record = record_of(of, who)
      if record and of.count then
        for i = 1, #record.held do
          local amount = taken(record, i)
          if amount > 0 and (not hold or of.holds[i] == hold) then
            release(of, i, amount)
            record.held[i], record.used[i], record.want[i] = 0, 0, 0
            record.changed = true
          end
        end
        if not hold then
          of.nodes[who], of.left = false, true
          put(deletes, of.key, 'n:' .. who)
        end
      end
    end
  end
  if not hold then
    ends[key] = true
  end
end

local function end_lent(ghost) -- what was handed over
  local quantity, amount, name = string.match(ghost, '^h:(%d+):(%d+):%d+:%d+:[^:]*:(.*)$')
  quantity, amount = tonumber(quantity), tonumber(amount)
  local of = model(name)
  release(of, quantity, amount)
  of.lent[quantity] = max(0, (of.lent[quantity] or 0) - amount)
  of.left = true
  put(removes, ghosts_key, ghost)
end

for _, due in ipairs(call('ZRANGEBYSCORE', nodes_key, '-inf', '(' .. text(now), 'LIMIT', 0, SWEPT)) do
  if due ~= id then
    local holds = call('HGET', base .. 'node:' .. due, 'holds')
    bury(due, tonumber(call('ZSCORE', nodes_key, due)), holds)
  end
end
for _, due in ipairs(call('ZRANGEBYSCORE', ghosts_key, '-inf', '(' .. text(now), 'LIMIT', 0, SWEPT)) do
  local kind = string.sub(due, 1, 1)
  if kind == 'h' then
    end_lent(due)
  else
    local hold, who = string.match(due, '^d:(%d+):(.*)$')
    who = who or string.sub(due, 3)
    if who ~= id then -- the node that calls resumes what is left of its shares
      end_shares(who, tonumber(hold))
      put(removes, ghosts_key, due)
    end
  end
end

local function is_empty(of)
  for i = 1, of.count do
    if (of.sums[i] or 0) > 0 then
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
      put(sets, of.key, 'sums', joined(of.sums, of.count), 'lent', joined(of.lent, of.count))
      if of.new_limits then
        put(sets, of.key, 'limits', of.line, 'version', text(of.version))
      end
      if type(of.fair) == 'table' then
        put(sets, of.key, 'fair', text(of.fair.at) .. ';' .. text(of.fair.nodes) .. ';'
            .. joined(of.fair.levels, of.count) .. ';' .. joined(of.fair.used, of.count) .. ';'
            .. joined(of.fair.idle, of.count))
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
        local parts = {}
        for i = 1, #record.held do
          local h, u, w, n = record.held[i], record.used[i], record.want[i], record.need[i]
          parts[i] = h + u + w + n == 0 and '-' or string.format('%.0f:%.0f:%.0f:%.0f', h, u, w, n)
        end
        put(sets, of.key, 'n:' .. who, text(record.generation) .. ';' .. table.concat(parts, ','))
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
  end_shares(id)
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
  apply()
  return known and 'forgotten' or 'unknown'
end

-- This node's own ghosts end: it is here again.
local holds = {}
for _, hold in ipairs(numbers(node[7])) do
  holds[hold] = true
  if verb == 'exchange' then
    put(removes, ghosts_key, 'd:' .. text(hold) .. ':' .. id)
  end
end
if verb == 'exchange' then
  put(removes, ghosts_key, 'e:' .. id)
end

-- The fair share of each quantity whose wants exceed it: the highest level such that no node gets more than it wants or
-- less than it uses, and everybody else the level (max-min fairness). Shares of the dead count as they are.
local alive
local function live()
  if not alive then
    alive = {[id] = true}
    for _, who in ipairs(call('ZRANGE', nodes_key, 0, -1)) do
      alive[who] = true
    end
    local gone = removes[nodes_key]
    if gone then
      for _, who in ipairs(gone) do
        alive[who] = nil
      end
    end
  end
  return alive
end

local function water_level(available, floors, wants)
  local points, level_of = {}, 0
  local height = 0
  for i = 1, #floors do
    height = height + floors[i]
    if wants[i] > floors[i] then
      points[#points + 1] = {floors[i], 1}
      points[#points + 1] = {wants[i], -1}
    end
  end
  table.sort(points, function(a, b) return a[1] < b[1] end)
  local rising = 0
  for _, point in ipairs(points) do
    local next_height = height + rising * (point[1] - level_of)
    if next_height > available then
      break
    end
    height, level_of, rising = next_height, point[1], rising + point[2]
  end
  if rising > 0 and available > height then
    return level_of + floor((available - height) / rising)
  end
  return level_of
end

local function compute_fair(of)
  local floors, wants, used_by_all, idle, here = {}, {}, {}, {}, 0
  for i = 1, of.count do
    floors[i], wants[i], used_by_all[i], idle[i] = {}, {}, 0, 0
  end
  local fields = call('HGETALL', of.key)
  for at = 1, #fields, 2 do
    local who = string.match(fields[at], '^n:(.*)$')
    if who then
      if of.nodes[who] == nil then
        of.nodes[who] = read_record(fields[at + 1])
      end
    end
  end
  for who, record in pairs(of.nodes) do
    if record then
      local is_live = live()[who]
      here = here + (is_live and 1 or 0)
      for i = 1, of.count do
        if of.limits[i] then
          local least = is_live and (record.used[i] or 0) or taken(record, i)
          local most = is_live and max(least, record.want[i] or 0) or least
          used_by_all[i] = used_by_all[i] + least
          idle[i] = idle[i] + (is_live and 0 or least - (record.used[i] or 0))
          if of.claim and of.claim.id == who and of.claim.quantity == i then
            least = max(least, of.claim.need)
            most = max(most, least)
          end
          local list = floors[i]
          list[#list + 1] = least
          wants[i][#list] = most
        end
      end
    end
  end
  local levels = {}
  for i = 1, of.count do
    levels[i] = false
    if of.limits[i] then
      local available, sum = of.limits[i] - (of.lent[i] or 0), 0
      for j = 1, #wants[i] do
        sum = sum + wants[i][j]
      end
      if sum > available then
        levels[i] = water_level(available, floors[i], wants[i])
      end
    end
  end
  of.fair = {at = now, nodes = max(1, here), levels = levels, used = used_by_all, idle = idle}
  of.changed = true
end

local function fair_of(of)
  if type(of.fair) == 'string' then
    local at, here, levels, used, idle = string.match(of.fair, '^(%d+);(%d+);([^;]*);([^;]*);(.*)$')
    of.fair = {at = tonumber(at), nodes = tonumber(here), levels = numbers(levels), used = numbers(used),
               idle = numbers(idle)}
  end
  if not of.fair or now - of.fair.at >= max(FAIR_MS, of.fair.nodes) then
    compute_fair(of)
  end
  return of.fair
end

local function claim_of(of)
  if type(of.claim) == 'string' then
    local quantity, need, seen, who = string.match(of.claim, '^(%d+):(%d+):(%d+):(.*)$')
    of.claim = {quantity = tonumber(quantity), need = tonumber(need), seen = tonumber(seen), id = who}
  end
  local claim = of.claim
  if claim and (now - claim.seen > CLAIM_MS or not live()[claim.id]) then
    of.claim, of.changed = false, true
  end
end

-- Each model of the request.
local lines = {}

local function settle(of, given, at)
  local ask = read_record('0;' .. given)
  local record = record_of(of, id)
  local trusted = learning and not (record and record.generation == generation)
  local after = {generation = generation, held = {}, used = ask.used, want = ask.want, need = ask.need, changed = true}
  for i = 1, of.count do
    local held, used = ask.held[i] or 0, ask.used[i] or 0
    if not trusted then -- it holds no more than the ledger says
      held = min(held, record and record.held[i] or 0)
    end
    after.held[i], after.used[i] = held, used
    after.want[i], after.need[i] = max(ask.want[i] or 0, used), ask.need[i] or 0
    of.sums[i] = (of.sums[i] or 0) - (record and taken(record, i) or 0) + max(held, used)
  end
  of.nodes[id], of.changed = after, true
  for quantity, amount, hold in string.gmatch(ARGV[at + 2], '(%d+):(%d+):(%d+)') do
    quantity, amount = tonumber(quantity), tonumber(amount)
    of.sums[quantity] = (of.sums[quantity] or 0) + amount
    of.lent[quantity] = (of.lent[quantity] or 0) + amount
    put(adds, ghosts_key, text(now + hold),
        table.concat({'h', text(quantity), text(amount), text(hold), text(number), id, of.name}, ':'))
  end
  return after
end

local function grow(of, own)
  claim_of(of)
  local fair = fair_of(of)
  for i = 1, of.count do
    local limit = of.limits[i]
    if limit then
      local free = limit - of.sums[i]
      local claim = of.claim and of.claim.quantity == i and of.claim
      if claim and claim.id ~= id then
        local other = record_of(of, claim.id)
        free = free - max(0, claim.need - (other and other.held[i] or 0))
      end
      local held, count = own.held[i], taken(own, i)
      local need, target, level = min(own.need[i], limit), own.want[i], fair.levels[i]
      if level then -- what is left of the division goes to those who ask first
        target = max(own.used[i], min(target, level + (claim and 0 or 1)))
      end
      local step = target - count
      if not level then
        step = min(step, max(ceil(limit / (SLICES * fair.nodes)), floor(free / (2 * fair.nodes))))
      end
      if need > held then -- a request that no smaller share admits: all that it takes, or a claim to it
        local own_claim = claim and claim.id == id
        if free >= need - count then
          step = max(step, need - count)
          if own_claim then
            of.claim = false
          end
        elseif own_claim then
          claim.seen, claim.need = now, need
        elseif not of.claim then
          local others = (fair.used[i] or 0) - own.used[i]
          if need <= limit - (of.lent[i] or 0) - others then
            of.claim = {quantity = i, need = need, seen = now, id = id}
            compute_fair(of) -- the share of the others falls
            fair = of.fair
          end
        end
      elseif claim and claim.id == id then
        of.claim = false
      end
      if free >= 0 then
        own.held[i] = max(held, min(target, count))
        step = min(step, free)
        if step > 0 then
          own.held[i] = count + step
          of.sums[i] = of.sums[i] + step
        end
      end
    end
  end
end

for at = 10, #ARGV, 3 do
  local key = KEYS[5 + (at - 10) / 3]
  local of = model(string.sub(key, #base + 3))
  local version, limits = string.match(ARGV[at], '^(%d+);(.*)$')
  if not of.line or (version == '0' and of.line ~= limits) then
    set_limits(of, limits)
    of.version, of.fair, of.new_limits = of.version + 1, nil, true
  end
  local own = settle(of, ARGV[at + 1], at)
  local idle = true
  for i = 1, of.count do
    idle = idle and own.held[i] == 0 and own.want[i] == 0
  end
  if verb == 'exchange' and not learning then
    grow(of, own)
  end
  local parts = {}
  for i = 1, of.count do
    if of.limits[i] then
      local level = type(of.fair) == 'table' and of.fair.levels[i]
      local claimed = of.claim and of.claim.quantity == i
      local target = level and max(own.used[i], min(own.want[i], level + (claimed and 0 or 1))) or own.held[i]
      local unused = type(of.fair) == 'table' and of.fair.idle[i] or 0
      parts[i] = table.concat({text(own.held[i]), text(min(target, own.held[i])),
                               text(max(0, of.limits[i] - of.sums[i])), text(unused)}, ':')
      holds[of.holds[i]] = true
    else
      parts[i] = '-'
    end
  end
  local line = text(of.version) .. ';' .. table.concat(parts, ',')
  if limits ~= of.line then
    line = line .. ';' .. of.line
  end
  lines[#lines + 1] = line
  if idle then
    of.nodes[id], of.left = false, true
    put(deletes, of.key, 'n:' .. id)
    put(deletes, node_key, 'm:' .. of.name)
  else
    put(sets, node_key, 'm:' .. of.name, '')
  end
end

-- What has changed is written, and the reply kept for a repeated request.
write_models()
local kept = {}
for hold in pairs(holds) do
  kept[#kept + 1] = hold
end
table.sort(kept)
local held_for = joined(kept, #kept)
local next_nonce = redis.sha1hex(table.concat({nonce, token, id, text(number), time[1], time[2], run}, ':'))
local count = call('ZCARD', nodes_key)
local reply = table.concat({learning and 'learning' or 'ok', next_nonce, text(generation),
  text(max(0, learning_until - now)), text(count), meta[8] or '0', table.concat(lines, '\n')}, '\n')
put(sets, node_key, 'number', text(number), 'token', token, 'nonce', next_nonce, 'generation', text(generation),
    'boot', boot, 'base', text(clock_base), 'holds', held_for, 'reply', reply)
put(sets, meta_key, 'format', FORMAT, 'run', run, 'generation', text(generation), 'learning', text(learning_until),
    'clock', text(now), 'raw', text(raw), 'lease', text(longest_ms))
if verb == 'leave' then
  bury(id, now, held_for)
else
  put(adds, nodes_key, text(now + lease_ms), id)
end
apply()
return reply
