"""Caches that change size or form.

extend.py     adds a segment to a finished cache
abandon.py    deletes an unfinished extension
copy.py       writes a cache to another place, codec or selection
copying.py    selected rows and the transcoding loop, for copies and their repair
transcode.py  one tap from codec to codec
"""
