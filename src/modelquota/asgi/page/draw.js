// The pieces of the page that show one limit, one meter and one model.

const template = name => document.getElementById(name).content.firstElementChild;
const parts = (root, ...names) => Object.fromEntries(names.map(name => [name, root.querySelector("." + name)]));

function showCounts(list, counts) {
  counts.forEach(([label, value], index) => {
    let item = list.children[index];
    if (!item) {
      item = document.createElement("div");
      item.append(document.createElement("dt"), document.createElement("dd"));
      list.append(item);
    }
    say(item.firstChild, label);
    say(item.lastChild, value);
  });
  while (list.children.length > counts.length) list.lastChild.remove();
}

function showSpark(svg, history) {
  const drawn = history.drawn();
  say(svg.firstElementChild, drawn.words);
  for (const name of ["line", "area", "refused"]) attribute(svg.querySelector("." + name), "d", drawn[name]);
}

function showNow(element, watches, waiting) {
  const recent = watches.reduce((sum, watch) => sum + watch.recent, 0);
  const refuses = watches.some(watch => watch.refuses);
  element.className = "now" + (refuses ? " refuses" : waiting ? " waits" : "");
  const words = [];
  // Longer if the page was paused or its tab in the background, since it is not known when in that time it was.
  const ms = Math.max(...watches.map(watch => watch.recentMs));
  const seconds = ms < RECENT_MS + 2 * REFRESH_MS ? RECENT_MS / 1000 : Math.ceil(ms / 1000);
  if (recent) words.push(`${figure(recent)} refused in ${seconds} s`);
  else if (refuses) words.push("refuses");
  if (waiting) words.push(`${figure(waiting)} waiting`);
  say(element, words.join(" · "));
}

class LimitView {
  constructor() {
    this.root = template("a-limit").cloneNode(true);
    Object.assign(this, parts(this.root, "label", "used", "most", "track", "spark", "words"));
    [this.base, this.burst] = this.track.children;
  }

  show(limit, [used, left, percent, ahead], share, state, history) {
    this.root.className = "limit " + state;
    const text = value => figure(value, limit.unit);
    // A rate and its burst are used together: what counts is the last second, or what is not yet made up for.
    const most = Math.ceil(limit.max) + limit.burst;  // a rate of 0.5 admits one in its second
    const counted = ahead ? Math.max(used, Math.ceil(limit.max) + ahead) : used;
    say(this.label, limit.label);
    say(this.used, text(counted));
    say(this.most, `of ${text(most)}`);
    let rate = "";
    if (limit.burst) rate = `${text(limit.max)} a second + burst of ${text(limit.burst)}`;
    else if (most !== limit.max) rate = `${text(limit.max)} a second`;
    if (ahead) rate += `, ${text(ahead)} of it used; ${text(used)} in this second`;
    const words = [rate];
    if (share) {
      const [own, free, ghosts] = share;
      words.push(`share of this host: ${text(own)}, free: ${text(free)}`);
      if (ghosts) words.push(`${text(ghosts)} held by hosts that are gone`);
    }
    const about = words.filter(Boolean).join("; ");
    let now = "";
    if (limit.max === 0 && !limit.burst) now = "admits nothing";
    else if (state === "quiet") now = "only counted, refuses nothing";
    else if (state === "waits") now = "nothing left, requests wait";
    else if (state === "refuses") {
      now = left > 0 ? `refused requests just now, ${text(left)} left` : "nothing left, refuses requests";
    }
    const [rateWords, nowWords] = this.words.children;
    this.words.hidden = !about && !now;
    say(rateWords, about + (about && now ? " · " : ""));
    say(nowWords, now);
    const filled = limit.burst && !share ? 100 * counted / most : percent;
    this.bar(limit, filled / 100 * most, most);
    attribute(this.track, "aria-label", limit.label);
    attribute(this.track, "aria-valuenow", String(Math.min(100, Math.floor(filled))));
    const whole = `${text(counted)} of ${text(most)}`;
    attribute(this.track, "aria-valuetext", [whole, about, now].filter(Boolean).join("; "));
    showSpark(this.spark, history);
  }

  bar(limit, used, most) {
    const width = (fill, from, size) => {
      fill.style.width = Math.max(0, Math.min(100, size ? 100 * (used - from) / size : 100)) + "%";
    };
    const rate = most - limit.burst;
    this.burst.hidden = !limit.burst;
    this.base.style.flexGrow = limit.burst ? rate : 1;
    this.burst.style.flexGrow = limit.burst;
    width(this.base.firstChild, 0, rate);
    width(this.burst.firstChild, rate, limit.burst);
  }
}

function showLimits(box, views, row, kind, watch) {
  kind.limits.forEach((limit, index) => {
    if (!views[index]) box.append((views[index] = new LimitView()).root);
    const share = row.shares?.[limit.name];
    views[index].show(limit, row.limits[index], share, watch.states[index], watch.histories.get(limit.name));
  });
  while (views.length > kind.limits.length) views.pop().root.remove();
}

class MeterView {
  constructor() {
    this.root = template("a-meter").cloneNode(true);
    Object.assign(this, parts(this.root, "id", "action", "now", "edit", "limits"));
    this.views = [];
    this.edit.addEventListener("click", () => edit(this.row.id));
  }

  show({row, kind, watch}) {
    this.row = row;
    this.edit.hidden = !state.admin;
    say(this.id, row.id.slice(row.id.indexOf("#")));
    say(this.action, kind.action);
    showNow(this.now, [watch], 0);
    showLimits(this.limits, this.views, row, kind, watch);
  }
}

class ModelView {
  constructor(open) {
    this.root = template("a-model").cloneNode(true);
    Object.assign(this, parts(this.root, "head", "action", "now", "tightest", "spark", "body", "counts", "none",
      "limits", "meters"));
    this.name = this.root.querySelector("h3 button");
    this.views = [];
    this.meterViews = [];
    this.open = open;
    this.edit = this.body.querySelector(":scope > .edit");
    this.edit.addEventListener("click", () => edit(this.model.id));
    // In the list the whole row opens it; by keyboard it is the button.
    this.head.addEventListener("click", event => {
      if (!asList() && !this.name.contains(event.target)) return;
      this.open = !this.open;
      this.show(this.model);
    });
  }

  show(model) {
    this.model = model;
    const {own, members} = model;
    say(this.name, model.id);
    attribute(this.name, "aria-expanded", String(this.open));
    this.action.style.visibility = own ? "" : "hidden";
    say(this.action, own ? own.kind.action : "");
    showNow(this.now, members.map(member => member.watch), model.waiting);
    this.showTightest(model);
    this.body.hidden = !this.open;
    if (this.open) this.showBody(model);
  }

  showTightest({members}) {
    let tightest = null;
    for (const {row, kind, watch} of members) {
      kind.limits.forEach((limit, index) => {
        const state = watch.states[index], percent = row.limits[index][2];
        const rank = state === "refuses" ? 3 : state === "waits" ? 2 : state === "quiet" ? 0 : 1;
        if (!tightest || rank > tightest.rank || (rank === tightest.rank && percent > tightest.percent)) {
          tightest = {rank, percent, limit, state, row, history: watch.histories.get(limit.name)};
        }
      });
    }
    this.tightest.hidden = !tightest;
    this.spark.style.visibility = tightest ? "" : "hidden";
    if (!tightest) return;
    const {row, limit, percent, state} = tightest, meter = row.id.indexOf("#");
    this.tightest.className = "tightest " + state;
    say(this.tightest.children[0], limit.label + (meter < 0 ? "" : ` (${row.id.slice(meter)})`));
    say(this.tightest.children[1], percentage(percent));
    this.tightest.querySelector(".fill").style.width = Math.min(100, percent) + "%";
    showSpark(this.spark, tightest.history);
  }

  showBody({own, members, refused}) {
    this.counts.hidden = !own;
    this.edit.hidden = !state.admin || !own;
    if (own) {
      const {row, kind} = own, unit = kind.unit === "usd" ? "usd" : "";
      showCounts(this.counts, [
        ["Serving", figure(row.serving)], ["Waiting", figure(row.waiting)],
        ["Admitted", figure(row.admitted)], ["After a wait", figure(row.waited)],
        ["Refused", figure(refused)], ["Warned", figure(row.warned)],
        [unit ? "Charged" : "Tokens charged", figure(row.tokens_charged, unit)],
        ["Given back", figure(row.tokens_refunded, unit)],
      ]);
      showLimits(this.limits, this.views, row, kind, own.watch);
    }
    const limited = own && own.kind.limits.length > 0;
    this.limits.hidden = !limited;
    this.none.hidden = limited;
    say(this.none, own ? "No limit is set." : "No quota of its own, only meters.");
    const meters = own ? members.slice(1) : members;
    meters.forEach((meter, index) => {
      if (!this.meterViews[index]) this.meters.append((this.meterViews[index] = new MeterView()).root);
      this.meterViews[index].show(meter);
    });
    while (this.meterViews.length > meters.length) this.meterViews.pop().root.remove();
  }
}
