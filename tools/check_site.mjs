// Looks at pages of the built site in a browser, at desktop and phone width, light and dark: whether a page scrolls
// sideways, and what axe-core finds. Exit status 1 where a page does or a finding is serious. With --shots FOLDER the
// screenshots are kept for people to look at.
//
//   make docs
//   mkdir -p /tmp/browser && (cd /tmp/browser && npm install puppeteer-core axe-core)
//   NODE_PATH=/tmp/browser/node_modules node tools/check_site.mjs --shots /tmp/shots index.html guides/masks.html
//
// Without names it looks at every page. $CHROMIUM is the browser, /usr/bin/chromium (Debian: apt install chromium) else.
import fs from "node:fs";
import {createRequire} from "node:module";
import path from "node:path";

const require = createRequire(import.meta.url);
const puppeteer = require("puppeteer-core");
const axe = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const site = path.resolve(path.dirname(new URL(import.meta.url).pathname), "../site");
const names = process.argv.slice(2);
const shots = names[0] === "--shots" ? names.splice(0, 2)[1] : null;
const all = () => fs.readdirSync(site, {recursive: true}).filter(name => name.endsWith(".html") && name !== "404.html");
const pages = names.length ? names : all().sort();
const widths = {desktop: [1440, 900], phone: [390, 844]};

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--allow-file-access-from-files"],
});
let bad = 0;
for (const page of pages) {
  for (const [device, [width, height]] of Object.entries(widths)) {
    for (const scheme of ["light", "dark"]) {
      const context = await browser.createBrowserContext(); // so that no choice of a colour is remembered
      const tab = await context.newPage();
      await tab.setViewport({width, height, isMobile: device === "phone"});
      await tab.emulateMediaFeatures([{name: "prefers-color-scheme", value: scheme}]);
      await tab.goto(`file://${path.join(site, page)}`, {waitUntil: "load"});
      await new Promise(done => setTimeout(done, 300));
      if (shots) {
        const file = `${page.replace(".html", "").replaceAll("/", "-")}-${device}-${scheme}.png`;
        fs.mkdirSync(shots, {recursive: true});
        await tab.screenshot({path: path.join(shots, file)});
      }
      // Against the width asked for: a phone zooms out until a page that is too wide fits.
      const wide = (await tab.evaluate(() => document.documentElement.scrollWidth)) - width;
      await tab.evaluate(axe);
      const found = await tab.evaluate(async () => (await axe.run()).violations);
      const serious = found.filter(one => ["serious", "critical"].includes(one.impact));
      const lines = serious.flatMap(one => one.nodes.slice(0, 3).map(node => `${one.id}: ${node.target}`));
      if (wide > 0) lines.push(`scrolls sideways by ${wide} pixels`);
      bad += lines.length > 0;
      console.log([`${page}, ${device}, ${scheme}: ${lines.length ? "" : "fine"}`, ...lines].join("\n  "));
      await context.close();
    }
  }
}
await browser.close();
console.log(bad ? `${bad} views have something to mend` : `${pages.length} pages are fine`);
process.exit(bad ? 1 : 0);
