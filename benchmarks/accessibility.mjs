// Who can read a report: axe-core's violations and sideways scrolling at three widths, light and dark, folded and unfolded, and the
// pages that it prints. Needs, in any folder: npm install axe-core puppeteer-core. Run there:
//   node PATH/benchmarks/accessibility.mjs report.html [more.html ...]     (BROWSER names a Chromium; /usr/bin/chromium else)
// Ends with exit code 1 where a page has a violation or scrolls sideways.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(resolve("package.json"));
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const browser = await require("puppeteer-core").launch({
  executablePath: process.env.BROWSER ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
let failed = false;

for (const file of process.argv.slice(2)) {
  const page = await browser.newPage();
  const open = async () => page.goto(pathToFileURL(resolve(file)).href);
  await page.setBypassCSP(true); // the page forbids scripts, and axe is one
  for (const width of [390, 768, 1280])
    for (const scheme of ["light", "dark"])
      for (const folded of [true, false]) {
        await page.setViewport({ width, height: 900 });
        await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
        await open();
        if (!folded) await page.evaluate(() => document.querySelectorAll("details").forEach((part) => (part.open = true)));
        await page.evaluate(axe);
        const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        failed ||= violations.length > 0 || wide > width;
        const said = violations.map((one) => `${one.id} (${one.impact}, ${one.nodes.length} times: ${one.nodes[0].html.slice(0, 120)})`);
        if (wide > width) said.push(`scrolls sideways: ${wide} pixels`);
        if (said.length) console.log(`${file}, ${width} pixels, ${scheme}, ${folded ? "" : "un"}folded: ${said.join("; ")}`);
      }
  await open();
  const pdf = Buffer.from(await page.pdf({ format: "A4", preferCSSPageSize: true })).toString("latin1");
  console.log(`${file}: ${failed ? "violations" : "no violation"}, prints on ${pdf.match(/\/Type\s*\/Page\b(?!s)/g).length} pages`);
  await page.close();
}
await browser.close();
process.exit(failed ? 1 : 0);
