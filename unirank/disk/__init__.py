"""disk: a file is whole or not there, and is checked.

In: bytes, JSON records, tensors, and the path where they belong.
Out: files that appear in one step, and what is read back only where its checksum holds.

Here one may touch the file system, and nothing of a model. Every writer of unirank goes through
`files.write_atomically` or `files.staged_directory`; a writer that does without them leaves half-written files
when the disk is full.

Changed most often: a new kind of damage that has to be recognised (`tensorfile`), a new hash
(`hashing`).
"""
