"""Style sheet of a report's page, for phones, desktops, paper, light and dark.

Figures are drawn in the same variables (`--s1` ... of figures.py), so they change with the page. Contrast: text
at least 7:1 on the page, soft text 4.5:1, series 3:1 (WCAG 2.2, 1.4.3 and 1.4.11), in both schemes.
"""

LIGHT = """
  --page: #ffffff; --card: #f6f8fa; --line: #d0d7de; --ink: #1b1f24; --soft: #50575f; --link: #0b57a4; --warn: #8a3800;
  --s1: #0b5cad; --s2: #b3400f; --s3: #0a7350; --s4: #86358c; --s5: #7a5c00; --s6: #444b53;
"""
DARK = """
  --page: #14171b; --card: #1d2228; --line: #3b434c; --ink: #eceef1; --soft: #aeb6bf; --link: #83bfff; --warn: #ffb27d;
  --s1: #6db3ff; --s2: #ff9a6b; --s3: #52d3a2; --s4: #d79adf; --s5: #e3c04d; --s6: #c3c9cf;
"""

STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@media print {{ :root {{ color-scheme: light; {LIGHT} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.25rem; margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }}
p {{ margin: .5rem 0; max-width: 70ch; }}
a {{ color: var(--link); }}
header p, footer {{ color: var(--soft); }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .1rem 1rem; list-style: none; padding: 0; margin: .75rem 0; }}
nav a {{ display: inline-block; padding: .25rem 0; }}
footer {{ margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; font-size: .875rem; }}
.note {{ border-left: .3rem solid var(--warn); background: var(--card); padding: .5rem .75rem; margin: .75rem 0; }}
.note ul {{ margin: .25rem 0; padding-left: 1.2rem; }}
.scroll {{ overflow-x: auto; width: fit-content; max-width: 100%; margin: .75rem 0;
  background: /* a shadow where more is hidden on that side */
  linear-gradient(to right, var(--page) 50%, transparent) 0 0 / 2rem 100% local no-repeat,
  linear-gradient(to left, var(--page) 50%, transparent) 100% 0 / 2rem 100% local no-repeat,
  linear-gradient(to right, var(--line), transparent) 0 0 / .6rem 100% no-repeat,
  linear-gradient(to left, var(--line), transparent) 100% 0 / .6rem 100% no-repeat; }}
.scroll:focus-visible, a:focus-visible, summary:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
table {{ border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }}
caption {{ text-align: left; font-weight: 600; padding: .25rem 0; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }}
th:last-child, td:last-child {{ padding-right: 0; }}
th[scope=row] {{ font-weight: 500; min-width: 3.5rem; }}
td:not(.n) {{ min-width: 6rem; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.facts th {{ color: var(--soft); min-width: 7rem; }}
.facts td {{ overflow-wrap: anywhere; }}
.figures {{ display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
figure {{ margin: 0; min-width: 0; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 40rem; }}
figure svg text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
figcaption {{ font-weight: 600; margin-bottom: .25rem; }}
figure p {{ font-size: .875rem; margin: .25rem 0 0; max-width: 60ch; color: var(--soft); }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; padding: .25rem 0; color: var(--link); }}
pre {{ background: var(--card); padding: .75rem; overflow-x: auto; font-size: .8125rem; line-height: 1.45; margin: 0; }}
progress {{ width: 100%; max-width: 24rem; height: 1rem; accent-color: var(--s1); }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav {{ display: none; }}
  figure, tr, .note {{ break-inside: avoid; }}
  h2, caption {{ break-after: avoid; }}
  .scroll, pre {{ overflow: visible; background: none; }}
  pre {{ white-space: pre-wrap; }}
  table {{ font-size: 8pt; }} /* what does not fit on the page is lost */
  th {{ white-space: normal; }}
  .figures {{ grid-template-columns: 1fr 1fr; }}
}}
"""

# On paper nothing can be unfolded.
SCRIPT = """
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
"""
