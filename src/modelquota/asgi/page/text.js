// How numbers are written. Long ones are cut, not rounded, so that use never looks like more than it is.

const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 2});
const small = new Intl.NumberFormat("en", {maximumSignificantDigits: 3});
const brief = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1, roundingMode: "trunc"});
const money = new Intl.NumberFormat("en", {style: "currency", currency: "USD", maximumFractionDigits: 2,
  roundingMode: "trunc"});
const smallMoney = new Intl.NumberFormat("en", {style: "currency", currency: "USD", maximumSignificantDigits: 3,
  roundingMode: "trunc"});
const briefMoney = new Intl.NumberFormat("en", {style: "currency", currency: "USD", notation: "compact",
  maximumFractionDigits: 1, roundingMode: "trunc"});
const clock = new Intl.DateTimeFormat(undefined, {timeStyle: "medium"});

function figure(value, unit) {
  if (unit === "usd") {  // millionths of a dollar
    const dollars = value / 1e6;
    if (dollars >= 100000) return briefMoney.format(dollars);
    return (dollars > 0 && dollars < .1 ? smallMoney : money).format(dollars);
  }
  return (value > 0 && value < 1 ? small : value < 100000 ? whole : brief).format(value) + (unit === "MB" ? " MB" : "");
}

const percentage = value => `${value < 100 ? Math.floor(value) : whole.format(Math.round(value))} %`;
const seconds = value => `${figure(Math.floor(value))} s`;
const plural = (count, one, more) => `${figure(count)} ${count === 1 ? one : more}`;

function say(element, text) {  // ids, labels and paths are text, never markup
  if (element.textContent !== text) element.textContent = text;
}

function attribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}
