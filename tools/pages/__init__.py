"""Parts that report, viewer and commands share.

html.py      escaped HTML fragments: sections, tables, figures
figures.py   SVG figures
style.py     the style sheet
terminal.py  the console for tables
"""
