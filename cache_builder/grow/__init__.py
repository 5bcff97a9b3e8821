"""Caches that change size or form.

extend.py     adds a segment to a finished cache
abandon.py    deletes an unfinished extension
copy.py       writes a cache to another place, codec or selection
transcode.py  one tap from codec to codec
"""
