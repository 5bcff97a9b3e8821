"""Parts that report, viewer and commands share.

html.py      escaped HTML fragments: sections, tables, figures
figures.py   SVG figures
style.py     the style sheet
pictures.py  what picture files say of who made them
terminal.py  the console for tables
"""
