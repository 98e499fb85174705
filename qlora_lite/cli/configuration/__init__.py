"""The configuration of a run: one declaration of its settings, for flags, files and editors.

In reading order:

schema         the settings of a run, read from the command `train`
yaml_text      YAML as text with lines, and values as YAML
other_names    the nearest name of a setting, and the names of other programs
run_file       reads a configuration file, with all that is wrong in it
commented      writes one, with comments
json_schema    the same settings as a JSON schema
command        a command whose options may stand in a file
questions      questions of a command, asked again after a wrong answer
proposal       the settings of a good run, with reasons
init           asks, looks at model, records and memory, and writes a configuration
"""
