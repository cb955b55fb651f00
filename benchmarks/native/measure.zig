//! Measures `original.zig` from a native caller and prints one JSON object.
//!
//! Nanoseconds per check: the wall time of a round divided by all checks made in it, by all threads; the least and the
//! median of the rounds. (Of two threads the least is often a round in which one slept while the other had the lock to
//! itself; the median is the one to judge contention by.) Every limit is set and no check is refused. Models are
//! visited in a random order drawn beforehand; the caller passes the very id that the map holds, so that comparing it
//! with the key is one pointer comparison.
const std = @import("std");
const builtin = @import("builtin");
const original = @import("original.zig");

const Manager = original.ResourceQuotaManager;
const rounds = 7;
const checks_per_round = 1 << 18;
const model_counts = [_]usize{ 1, 1_000, 100_000 };
const thread_counts = [_]usize{ 1, 2 };
const max_threads = 2;

pub fn main(init: std.process.Init) !void {
    const allocator = std.heap.smp_allocator;
    var buffer: [4096]u8 = undefined;
    var stdout = std.Io.File.stdout().writerStreaming(init.io, &buffer);
    const out = &stdout.interface;

    try verify(allocator, init.io);
    const most_admitted = try mostAdmittedInTrueSecond(allocator, init.io);
    try out.print("{{\"zig\": \"{s}\", ", .{builtin.zig_version_string});
    try out.print("\"most_admitted_in_true_second\": {d}, \"checks\": [", .{most_admitted});
    for (model_counts, 0..) |model_count, i| {
        var fleet = try Fleet.init(allocator, init.io, model_count);
        defer fleet.deinit();
        for (thread_counts, 0..) |thread_count, j| {
            const timing = try fleet.time(thread_count);
            if (i + j > 0) try out.writeAll(", ");
            try out.print("{{\"models\": {d}, \"threads\": {d}, ", .{ model_count, thread_count });
            try out.print("\"ns\": {d:.2}, \"median_ns\": {d:.2}}}", .{ timing.least_ns, timing.median_ns });
        }
    }
    try out.writeAll("]}\n");
    try out.flush();
}

fn generous(model_id: []const u8) original.ResourceQuotaConfig {
    const plenty = 1 << 50;
    return .{
        .model_id = model_id,
        .max_requests_per_second = 1e9,
        .max_tokens_per_second = 1e12,
        .max_tokens_per_hour = plenty,
        .max_tokens_per_day = plenty,
        .max_requests_per_hour = plenty,
        .max_requests_per_day = plenty,
    };
}

/// Per check, over the rounds.
const Timing = struct { least_ns: f64, median_ns: f64 };

/// A manager with its models, and the order in which each thread visits them.
const Fleet = struct {
    allocator: std.mem.Allocator,
    manager: Manager,
    ids: [][]const u8,
    orders: [max_threads][]u32,
    /// Read from memory, so that no limit can be decided when compiling.
    request: original.QuotaRequest = .{ .estimated_tokens = 100 },

    fn init(allocator: std.mem.Allocator, io: std.Io, model_count: usize) !Fleet {
        var self: Fleet = .{
            .allocator = allocator,
            .manager = .init(allocator, io),
            .ids = try allocator.alloc([]const u8, model_count),
            .orders = undefined,
        };
        for (self.ids, 0..) |*id, i| {
            var name: [32]u8 = undefined;
            const model_id = try std.fmt.bufPrint(&name, "model-{d}", .{i});
            try self.manager.setQuota(generous(model_id), original.monotonicNs());
            id.* = self.manager.getQuota(model_id).?.model_id;
        }
        for (&self.orders, 0..) |*order, seed| {
            var random = std.Random.DefaultPrng.init(seed);
            order.* = try allocator.alloc(u32, checks_per_round);
            for (order.*) |*index| index.* = random.random().uintLessThan(u32, @intCast(model_count));
        }
        return self;
    }

    fn deinit(self: *Fleet) void {
        for (self.orders) |order| self.allocator.free(order);
        self.allocator.free(self.ids);
        self.manager.deinit();
    }

    fn time(self: *Fleet, thread_count: usize) !Timing {
        var rounds_ns: [rounds]i64 = undefined;
        for (&rounds_ns) |*round_ns| round_ns.* = try self.roundNs(thread_count);
        std.mem.sort(i64, &rounds_ns, {}, std.sort.asc(i64));
        const checks: f64 = @floatFromInt(checks_per_round * thread_count);
        return .{
            .least_ns = @as(f64, @floatFromInt(rounds_ns[0])) / checks,
            .median_ns = @as(f64, @floatFromInt(rounds_ns[rounds / 2])) / checks,
        };
    }

    /// From the moment at which all threads stand ready until the last is done.
    fn roundNs(self: *Fleet, thread_count: usize) !i64 {
        if (thread_count == 1) {
            const start_ns = original.monotonicNs();
            self.checkAll(0);
            return original.monotonicNs() - start_ns;
        }
        var gate: Gate = .{};
        var threads: [max_threads]std.Thread = undefined;
        for (threads[0..thread_count], 0..) |*thread, i| {
            thread.* = try std.Thread.spawn(.{}, checkAllBehindGate, .{ self, &gate, i });
        }
        while (gate.waiting.load(.acquire) < thread_count) std.atomic.spinLoopHint();
        const start_ns = original.monotonicNs();
        gate.open.store(true, .release);
        for (threads[0..thread_count]) |thread| thread.join();
        return original.monotonicNs() - start_ns;
    }

    fn checkAllBehindGate(self: *Fleet, gate: *Gate, thread_index: usize) void {
        _ = gate.waiting.fetchAdd(1, .acq_rel);
        while (!gate.open.load(.acquire)) std.atomic.spinLoopHint();
        self.checkAll(thread_index);
    }

    fn checkAll(self: *Fleet, thread_index: usize) void {
        const request: *volatile original.QuotaRequest = &self.request;
        for (self.orders[thread_index]) |index| {
            const result = self.manager.checkQuota(self.ids[index], request.*);
            std.mem.doNotOptimizeAway(&result);
            if (!result.allowed) @panic("a check was refused: what is measured would not be an admission");
        }
    }
};

const Gate = struct {
    waiting: std.atomic.Value(usize) = .init(0),
    open: std.atomic.Value(bool) = .init(false),
};

/// A hundred requests a second and no burst, asked for just before a window ends and just after it.
fn mostAdmittedInTrueSecond(allocator: std.mem.Allocator, io: std.Io) !u32 {
    var manager = Manager.init(allocator, io);
    defer manager.deinit();
    var config = generous("edge");
    config.max_requests_per_second = 100;
    config.burst_requests = 0;
    try manager.setQuota(config, 0);
    var admitted: u32 = 0;
    for ([_]i64{ std.time.ns_per_s - 1, std.time.ns_per_s }) |now_ns| {
        for (0..300) |_| {
            const result = manager.checkQuotaAt("edge", .{ .estimated_tokens = 1 }, now_ns);
            admitted += @intFromBool(result.allowed);
        }
    }
    return admitted;
}

fn expect(holds: bool, what: []const u8) void {
    if (!holds) std.debug.panic("the original decides wrongly: {s}", .{what});
}

/// A rival that forgot a limit would be fast: each one has to refuse on its own before anything is measured.
fn verify(allocator: std.mem.Allocator, io: std.Io) !void {
    const Case = struct { field: []const u8, kind: original.ViolationType, admitted: u32 };
    const cases = .{
        Case{ .field = "max_ram_mb", .kind = .ram_limit, .admitted = 0 },
        Case{ .field = "max_ssd_mb", .kind = .ssd_limit, .admitted = 0 },
        Case{ .field = "max_requests_per_second", .kind = .rate_limit, .admitted = 50 },
        Case{ .field = "max_tokens_per_second", .kind = .rate_limit, .admitted = 5 },
        Case{ .field = "max_tokens_per_hour", .kind = .quota_limit, .admitted = 5 },
        Case{ .field = "max_requests_per_hour", .kind = .quota_limit, .admitted = 50 },
        Case{ .field = "max_tokens_per_day", .kind = .quota_limit, .admitted = 5 },
        Case{ .field = "max_requests_per_day", .kind = .quota_limit, .admitted = 50 },
    };
    inline for (cases) |case| {
        var manager = Manager.init(allocator, io);
        defer manager.deinit();
        var config = generous("one");
        config.burst_requests = 0;
        config.burst_tokens = 0;
        @field(config, case.field) = 50;
        try manager.setQuota(config, 0);
        const request: original.QuotaRequest = .{ .estimated_tokens = 10, .ram_needed_mb = 60, .ssd_needed_mb = 60 };
        var admitted: u32 = 0;
        while (true) : (admitted += 1) {
            const result = manager.checkQuotaAt("one", request, 0);
            if (!result.allowed) {
                expect(result.violation_type.? == case.kind, case.field);
                break;
            }
        }
        expect(admitted == case.admitted, case.field);
        const stats = manager.getStats();
        expect(stats.total_checks == admitted + 1 and stats.throttled_requests == 1, "statistics");
    }
    try verifyBurst(allocator, io);
}

fn verifyBurst(allocator: std.mem.Allocator, io: std.Io) !void {
    var manager = Manager.init(allocator, io);
    defer manager.deinit();
    var config = generous("one");
    config.max_requests_per_second = 10;
    config.burst_requests = 5;
    try manager.setQuota(config, 0);
    // Rate and burst at once; then the rate alone, the burst being spent; after idle seconds, both again.
    for ([_]i64{ 0, 1, 4 }, [_]u32{ 15, 10, 15 }) |second, expected| {
        var admitted: u32 = 0;
        for (0..30) |_| {
            const now_ns = second * std.time.ns_per_s;
            admitted += @intFromBool(manager.checkQuotaAt("one", .{ .estimated_tokens = 1 }, now_ns).allowed);
        }
        expect(admitted == expected, "burst");
    }
}
