"""Publishing: the folder of an adapter, or of a merged or packed checkpoint, as a repository of the hub.

In reading order:

published_files   which files of a folder go up, after it was checked
push              push_to_hub
"""
