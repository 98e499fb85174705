"""Conversations: checked, written by a chat template, and what is learned of the text.

In reading order:

messages     the messages of a conversation, checked
marks        marks that show where a chat template writes each piece of a conversation
jinja        what the source of a chat template says about dates and generated text
turns        how a chat template opens and ends an answer
renderings   the renderings of a conversation, in which every piece of text is found
answers      the characters of a rendered conversation that are learned
template     the forms of a conversation that a chat template accepts
token_spans  the tokens of what is learned
"""
