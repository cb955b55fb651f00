//! The original specification's quota manager, written afresh from its text as a rival to measure against.
//!
//! One string hash map of model to limits and usage, one mutex around everything, windows of fixed length that are
//! reset on access. Where the text leaves a choice open, the cheaper one is taken: limits and usage share one map
//! entry, so that a check looks up once; the clock is read outside the lock; one comparison tells that no window has
//! ended; `current_usage` is the share of one limit.
const std = @import("std");

pub const ViolationAction = enum { reject, throttle, warn, queue };
pub const ViolationType = enum { ram_limit, ssd_limit, rate_limit, quota_limit };

pub const ResourceQuotaConfig = struct {
    model_id: []const u8,
    max_ram_mb: u64 = 2048,
    max_ssd_mb: u64 = 16384,
    max_requests_per_second: f32 = 100.0,
    max_tokens_per_second: f32 = 1000.0,
    max_tokens_per_hour: u64 = 1_000_000,
    max_tokens_per_day: u64 = 10_000_000,
    max_requests_per_hour: u64 = 10_000,
    max_requests_per_day: u64 = 100_000,
    burst_requests: u32 = 200,
    burst_tokens: u64 = 10_000,
    on_violation: ViolationAction = .throttle,
    grace_period_sec: u32 = 60,
};

pub const ResourceUsage = struct {
    current_ram_mb: u64 = 0,
    peak_ram_mb: u64 = 0,
    current_ssd_mb: u64 = 0,
    peak_ssd_mb: u64 = 0,
    requests_this_second: u32 = 0,
    tokens_this_second: u64 = 0,
    tokens_this_hour: u64 = 0,
    tokens_this_day: u64 = 0,
    requests_this_hour: u64 = 0,
    requests_this_day: u64 = 0,
    burst_requests_used: u32 = 0,
    burst_tokens_used: u64 = 0,
    total_violations: u64 = 0,
    ram_violations: u32 = 0,
    ssd_violations: u32 = 0,
    rate_violations: u32 = 0,
    quota_violations: u32 = 0,
};

pub const QuotaStats = struct {
    total_checks: u64 = 0,
    total_violations: u64 = 0,
    rejected_requests: u64 = 0,
    throttled_requests: u64 = 0,
    queued_requests: u64 = 0,
    ram_violations: u64 = 0,
    ssd_violations: u64 = 0,
    rate_violations: u64 = 0,
    quota_violations: u64 = 0,
};

pub const QuotaRequest = struct {
    estimated_tokens: u64,
    ram_needed_mb: u64 = 0,
    ssd_needed_mb: u64 = 0,
};

pub const QuotaCheckResult = struct {
    allowed: bool,
    reason: ?[]const u8 = null,
    violation_type: ?ViolationType = null,
    retry_after_ms: ?u64 = null,
    /// Percent. Denied: of the violated limit. Allowed: of the tokens per hour, this request included.
    current_usage: f32 = 0,
};

const second_ns = std.time.ns_per_s;
const hour_ns = std.time.ns_per_hour;
const day_ns = std.time.ns_per_day;

pub fn monotonicNs() i64 {
    var now: std.c.timespec = undefined;
    _ = std.c.clock_gettime(.MONOTONIC, &now);
    return @as(i64, now.sec) * second_ns + @as(i64, now.nsec);
}

fn asFloat(count: u64) f64 {
    return @floatFromInt(count);
}

fn asCount(value: f64) u64 {
    return std.math.lossyCast(u64, value);
}

fn percent(used: u64, limit: u64) f32 {
    return @floatCast(100.0 * asFloat(used) / asFloat(@max(limit, 1)));
}

fn msUntil(end_ns: i64, now_ns: i64) u64 {
    return @intCast(@divTrunc(@max(end_ns - now_ns, 0) + std.time.ns_per_ms - 1, std.time.ns_per_ms));
}

/// What a model has used, and when its windows began.
pub const Counters = struct {
    usage: ResourceUsage = .{},
    second_start_ns: i64,
    hour_start_ns: i64,
    day_start_ns: i64,
    /// The first end of the three windows: until then there is nothing to reset.
    next_end_ns: i64,

    fn init(now_ns: i64) Counters {
        return .{
            .second_start_ns = now_ns,
            .hour_start_ns = now_ns,
            .day_start_ns = now_ns,
            .next_end_ns = now_ns + second_ns,
        };
    }

    /// Starts each window that is over anew, at `now_ns`.
    fn resetEndedWindows(self: *Counters, config: *const ResourceQuotaConfig, now_ns: i64) void {
        const usage = &self.usage;
        if (now_ns - self.second_start_ns >= second_ns) {
            self.repayBurst(config, now_ns);
            usage.requests_this_second = 0;
            usage.tokens_this_second = 0;
            self.second_start_ns = now_ns;
        }
        if (now_ns - self.hour_start_ns >= hour_ns) {
            usage.requests_this_hour = 0;
            usage.tokens_this_hour = 0;
            self.hour_start_ns = now_ns;
        }
        if (now_ns - self.day_start_ns >= day_ns) {
            usage.requests_this_day = 0;
            usage.tokens_this_day = 0;
            self.day_start_ns = now_ns;
        }
        self.next_end_ns = @min(self.secondEnd(), self.hourEnd(), self.dayEnd());
    }

    fn secondEnd(self: *const Counters) i64 {
        return self.second_start_ns + second_ns;
    }

    fn hourEnd(self: *const Counters) i64 {
        return self.hour_start_ns + hour_ns;
    }

    fn dayEnd(self: *const Counters) i64 {
        return self.day_start_ns + day_ns;
    }

    /// Rate left unused since the second began gives burst back.
    fn repayBurst(self: *Counters, config: *const ResourceQuotaConfig, now_ns: i64) void {
        const usage = &self.usage;
        const elapsed = @as(f64, @floatFromInt(now_ns - self.second_start_ns)) / second_ns;
        const spare_requests = config.max_requests_per_second * elapsed - asFloat(usage.requests_this_second);
        const spare_tokens = config.max_tokens_per_second * elapsed - asFloat(usage.tokens_this_second);
        usage.burst_requests_used -|= std.math.lossyCast(u32, spare_requests);
        usage.burst_tokens_used -|= asCount(spare_tokens);
    }
};

const Violation = struct {
    kind: ViolationType,
    reason: []const u8,
    used: u64,
    limit: u64,
    /// When the window ends that is full; null where no wait helps.
    ends_ns: ?i64,

    fn of(kind: ViolationType, reason: []const u8, used: u64, limit: u64, ends_ns: ?i64) Violation {
        return .{ .kind = kind, .reason = reason, .used = used, .limit = limit, .ends_ns = ends_ns };
    }
};

/// What the map holds for a model.
const Model = struct {
    config: ResourceQuotaConfig,
    counters: Counters,
};

pub const ResourceQuotaManager = struct {
    allocator: std.mem.Allocator,
    io: std.Io,
    /// Guards `models` and `stats`.
    mutex: std.Io.Mutex = .init,
    models: std.StringHashMap(Model),
    stats: QuotaStats = .{},

    pub fn init(allocator: std.mem.Allocator, io: std.Io) ResourceQuotaManager {
        return .{ .allocator = allocator, .io = io, .models = .init(allocator) };
    }

    pub fn deinit(self: *ResourceQuotaManager) void {
        var ids = self.models.keyIterator();
        while (ids.next()) |id| self.allocator.free(id.*);
        self.models.deinit();
    }

    /// Sets the limits of a model at `now_ns`; a known one keeps its usage.
    pub fn setQuota(self: *ResourceQuotaManager, config: ResourceQuotaConfig, now_ns: i64) !void {
        self.mutex.lockUncancelable(self.io);
        defer self.mutex.unlock(self.io);
        var owned = config;
        if (self.models.getPtr(config.model_id)) |known| {
            owned.model_id = known.config.model_id;
            known.config = owned;
            return;
        }
        owned.model_id = try self.allocator.dupe(u8, config.model_id);
        errdefer self.allocator.free(owned.model_id);
        try self.models.put(owned.model_id, .{ .config = owned, .counters = .init(now_ns) });
    }

    pub fn getQuota(self: *ResourceQuotaManager, model_id: []const u8) ?ResourceQuotaConfig {
        self.mutex.lockUncancelable(self.io);
        defer self.mutex.unlock(self.io);
        const model = self.models.getPtr(model_id) orelse return null;
        return model.config;
    }

    pub fn getStats(self: *ResourceQuotaManager) QuotaStats {
        self.mutex.lockUncancelable(self.io);
        defer self.mutex.unlock(self.io);
        return self.stats;
    }

    pub fn checkQuota(self: *ResourceQuotaManager, model_id: []const u8, request: QuotaRequest) QuotaCheckResult {
        return self.checkQuotaAt(model_id, request, monotonicNs());
    }

    /// The check at a time of the caller's: charges one request and its tokens where every limit allows it.
    pub fn checkQuotaAt(
        self: *ResourceQuotaManager,
        model_id: []const u8,
        request: QuotaRequest,
        now_ns: i64,
    ) QuotaCheckResult {
        self.mutex.lockUncancelable(self.io);
        defer self.mutex.unlock(self.io);
        self.stats.total_checks += 1;
        const model = self.models.getPtr(model_id) orelse return .{ .allowed = true };
        if (now_ns >= model.counters.next_end_ns) {
            @branchHint(.unlikely);
            model.counters.resetEndedWindows(&model.config, now_ns);
        }
        const borrowed = Borrowed.by(model, request);
        if (firstViolation(model, request, borrowed)) |violation| {
            @branchHint(.unlikely);
            countViolation(&self.stats, model, violation.kind);
            if (model.config.on_violation != .warn) return .{
                .allowed = false,
                .reason = violation.reason,
                .violation_type = violation.kind,
                .retry_after_ms = if (violation.ends_ns) |ends_ns| msUntil(ends_ns, now_ns) else null,
                .current_usage = percent(violation.used, violation.limit),
            };
        }
        charge(&model.counters.usage, request, borrowed);
        const tokens_this_hour = model.counters.usage.tokens_this_hour;
        return .{ .allowed = true, .current_usage = percent(tokens_this_hour, model.config.max_tokens_per_hour) };
    }
};

fn charge(usage: *ResourceUsage, request: QuotaRequest, borrowed: Borrowed) void {
    usage.requests_this_second += 1;
    usage.requests_this_hour += 1;
    usage.requests_this_day += 1;
    usage.tokens_this_second += request.estimated_tokens;
    usage.tokens_this_hour += request.estimated_tokens;
    usage.tokens_this_day += request.estimated_tokens;
    usage.burst_requests_used += borrowed.requests;
    usage.burst_tokens_used += borrowed.tokens;
}

fn countViolation(stats: *QuotaStats, model: *Model, kind: ViolationType) void {
    const usage = &model.counters.usage;
    stats.total_violations += 1;
    usage.total_violations += 1;
    switch (kind) {
        .ram_limit => {
            stats.ram_violations += 1;
            usage.ram_violations +|= 1;
        },
        .ssd_limit => {
            stats.ssd_violations += 1;
            usage.ssd_violations +|= 1;
        },
        .rate_limit => {
            stats.rate_violations += 1;
            usage.rate_violations +|= 1;
        },
        .quota_limit => {
            stats.quota_violations += 1;
            usage.quota_violations +|= 1;
        },
    }
    switch (model.config.on_violation) {
        .reject => stats.rejected_requests += 1,
        .throttle => stats.throttled_requests += 1,
        .queue => stats.queued_requests += 1,
        .warn => {},
    }
}

/// What a request takes beyond the rates: it is charged to the burst.
const Borrowed = struct {
    requests: u32,
    tokens: u64,

    fn by(model: *const Model, request: QuotaRequest) Borrowed {
        const usage = &model.counters.usage;
        const requests = asFloat(usage.requests_this_second) + 1;
        const tokens = asFloat(usage.tokens_this_second + request.estimated_tokens);
        const excess_tokens = asCount(@ceil(tokens - model.config.max_tokens_per_second));
        return .{
            .requests = @intFromBool(requests > model.config.max_requests_per_second),
            .tokens = @min(excess_tokens, request.estimated_tokens),
        };
    }
};

/// The limits in the specification's order: RAM, SSD, requests/s, tokens/s, hour, day, burst. In one second a model
/// is held to its rate and the whole burst; over the seconds, to what is left of the burst.
fn firstViolation(model: *const Model, request: QuotaRequest, borrowed: Borrowed) ?Violation {
    const config = &model.config;
    const usage = &model.counters.usage;
    const tokens = request.estimated_tokens;
    const second_end = model.counters.secondEnd();
    const hour_end = model.counters.hourEnd();
    const day_end = model.counters.dayEnd();

    if (request.ram_needed_mb > 0 and usage.current_ram_mb + request.ram_needed_mb > config.max_ram_mb)
        return .of(.ram_limit, "RAM limit", usage.current_ram_mb, config.max_ram_mb, null);
    if (request.ssd_needed_mb > 0 and usage.current_ssd_mb + request.ssd_needed_mb > config.max_ssd_mb)
        return .of(.ssd_limit, "SSD limit", usage.current_ssd_mb, config.max_ssd_mb, null);

    const max_requests = config.max_requests_per_second + asFloat(config.burst_requests);
    if (asFloat(usage.requests_this_second) + 1 > max_requests)
        return .of(.rate_limit, "requests per second", usage.requests_this_second, asCount(max_requests), second_end);
    const max_tokens = config.max_tokens_per_second + asFloat(config.burst_tokens);
    if (asFloat(usage.tokens_this_second + tokens) > max_tokens)
        return .of(.rate_limit, "tokens per second", usage.tokens_this_second, asCount(max_tokens), second_end);

    if (usage.tokens_this_hour + tokens > config.max_tokens_per_hour)
        return .of(.quota_limit, "tokens per hour", usage.tokens_this_hour, config.max_tokens_per_hour, hour_end);
    if (usage.requests_this_hour + 1 > config.max_requests_per_hour)
        return .of(.quota_limit, "requests per hour", usage.requests_this_hour, config.max_requests_per_hour, hour_end);

    if (usage.tokens_this_day + tokens > config.max_tokens_per_day)
        return .of(.quota_limit, "tokens per day", usage.tokens_this_day, config.max_tokens_per_day, day_end);
    if (usage.requests_this_day + 1 > config.max_requests_per_day)
        return .of(.quota_limit, "requests per day", usage.requests_this_day, config.max_requests_per_day, day_end);

    if (usage.burst_requests_used + borrowed.requests > config.burst_requests)
        return .of(.rate_limit, "burst of requests", usage.burst_requests_used, config.burst_requests, second_end);
    if (usage.burst_tokens_used + borrowed.tokens > config.burst_tokens)
        return .of(.rate_limit, "burst of tokens", usage.burst_tokens_used, config.burst_tokens, second_end);
    return null;
}
