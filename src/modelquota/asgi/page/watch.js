// What the browser remembers of a model or meter: ten minutes of each limit, and what was refused just now.

const SLOT_MS = 5000;
const SLOTS = 120;
const NOTHING = 127;    // a slot in which nothing was read
const REFUSED = 128;    // added to a slot in which the limit refused requests
const RECENT_MS = 10000;

class History {
  constructor() {
    this.slots = new Uint8Array(SLOTS).fill(NOTHING);
    this.last = -1;
  }

  add(now, percent, refuses) {
    const slot = Math.floor(now / SLOT_MS);
    if (this.last < 0) this.last = slot;
    for (let passed = Math.max(this.last + 1, slot - SLOTS + 1); passed <= slot; passed++) {
      this.slots[passed % SLOTS] = NOTHING;
    }
    this.last = slot;
    const before = this.slots[slot % SLOTS], value = Math.min(100, Math.floor(percent));
    const highest = (before & 127) === NOTHING ? value : Math.max(before & 127, value);
    this.slots[slot % SLOTS] = highest | (before & REFUSED) | (refuses ? REFUSED : 0);
  }

  // Paths in a box of 120 by 30, and the same in words. A slot is one wide, the newest one is at the right edge.
  drawn() {
    let line = "", area = "", refused = "", start = -1, end = -1, highest = 0, refusedSlots = 0;
    const close = () => { if (start >= 0) area += `L${end} 30H${start}Z`; start = -1; };
    for (let age = SLOTS - 1; age >= 0; age--) {
      const value = this.slots[(this.last - age + SLOTS) % SLOTS], x = SLOTS - 1 - age;
      if (value & REFUSED) {
        refused += `M${x} 28.5h1`;
        refusedSlots++;
      }
      if ((value & 127) === NOTHING) {
        if (x - end > 12) close();   // a tab in the background reads once a minute; longer gaps are left open
        continue;
      }
      const y = 29 - (value & 127) * .28;
      highest = Math.max(highest, value & 127);
      if (start < 0) {
        start = x;
        line += `M${x} ${y}`;
        area += `M${x} 30L${x} ${y}`;
      } else {
        line += `L${x} ${y}`;
        area += `L${x} ${y}`;
      }
      end = x + 1;
      line += `h1`;
      area += `h1`;
    }
    close();
    const seconds = refusedSlots * SLOT_MS / 1000;
    const time = seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
    const words = `Last ten minutes: up to ${highest} %` + (seconds ? `, refused requests in ${time} of them` : "");
    return {line, area, refused, words};
  }
}

class Watch {
  constructor() {
    this.histories = new Map();
    this.refusals = [];         // [when it was read, when it had been read before, how many], of the last RECENT_MS
    this.violated = new Map();  // class of violation -> when it was last counted
    this.before = null;
    this.seen = 0;
  }

  // Take in one reading. Returns for each limit what it does to requests now: "refuses", "waits", "quiet" or "".
  add(now, row, kind) {
    const before = this.before, seen = this.seen;
    this.before = row;
    this.seen = now;
    const grew = before ? row.refused - before.refused : 0;
    if (grew > 0) this.refusals.push([now, seen, grew]);
    for (const [type, count] of Object.entries(row.violations)) {
      if (before && count > (before.violations[type] || 0)) this.violated.set(type, now);
    }
    this.refusals = this.refusals.filter(([at]) => now - at < RECENT_MS);
    this.recent = this.refusals.reduce((sum, [, , count]) => sum + count, 0);
    this.recentMs = this.refusals.length ? now - this.refusals[0][1] : 0;
    const refusing = this.blamed(row, kind, now);
    this.states = kind.limits.map((limit, index) => {
      const [, left, percent] = row.limits[index], full = left === 0;
      const refuses = refusing.has(index) || (full && limit.refuses_when_full);
      let history = this.histories.get(limit.name);
      if (!history) this.histories.set(limit.name, history = new History());
      history.add(now, percent, refuses);
      return !limit.denies ? "quiet" : refuses ? "refuses" : full ? "waits" : "";
    });
    this.refuses = this.recent > 0 || this.states.includes("refuses");
  }

  // The limits that refused just now. The server tells which class of limits was violated, when the request came; if it
  // waited first, that was before it was refused. Of a class, it is those that are full, or else the fullest, which the
  // request did not fit into.
  blamed(row, kind, now) {
    const blamed = new Set();
    if (this.recent === 0) return blamed;
    let latest = 0;
    for (const [type, at] of [...this.violated].sort((a, b) => b[1] - a[1])) {
      const able = [...kind.limits.keys()].filter(
        index => kind.limits[index].violation === type && kind.limits[index].denies);
      if (able.length === 0 || (now - at >= RECENT_MS && at < latest)) continue;
      latest = Math.max(latest, at);
      const full = able.filter(index => row.limits[index][1] === 0);
      const fullest = able.sort((a, b) => row.limits[b][2] - row.limits[a][2]).slice(0, 1);
      for (const index of full.length ? full : fullest) blamed.add(index);
    }
    return blamed;
  }
}
