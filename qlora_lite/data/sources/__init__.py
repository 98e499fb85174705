"""Records as they come from files, one at a time and in constant memory.

In reading order:

raw            a record, or the reason why it could not be read
json_lines     JSON Lines
json_layout    tells JSON Lines from JSON that spans lines
json_text      a JSON file as text that is read a piece at a time
json_document  arrays of records, and other JSON files
delimited      CSV and TSV
arrow_tables   parquet and Arrow, by pyarrow, and zstd
compression    opens a file, and decompresses gzip and zstd
data_file      the records of one file of any kind
folder         the data files of a folder
hub_dataset    data sets of the hub, by datasets
source         what the user named: its files, its fingerprint and its records
"""
