"""Repositories of the Hugging Face hub: fetching a checkpoint, and model cards.

In reading order:

revisions      the revision of a repository that one piece of work uses
client_errors   errors of huggingface_hub, as one sentence each
download        the files of a checkpoint that are needed, fetched once
model_card      README.md with the front matter that the hub reads
"""
