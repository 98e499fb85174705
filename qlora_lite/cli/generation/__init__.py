"""The commands that let a model answer.

talkers   options that they share, and the loaded model with its adapters
lines     what is read from a person or a pipe, and what is shown of an answer
chat      a conversation in the terminal, or of the lines of a pipe
generate  answers to the prompts of files
serve     answers over HTTP
"""
