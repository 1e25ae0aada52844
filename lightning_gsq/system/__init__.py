"""This machine: processors, processes, files, memory, random numbers.

seeding              generators keyed by what they are for
compiling            torch.compile and the C++ compiler, where there is one
memory               freed memory given back; what there is; the most that was used
console              what is printed is text, with no markup in it
files                files that are there whole or not at all
owned_folders        folders that may be replaced, because they were written here
locking              one process at a time in a folder
safetensors_headers  the weight files of a folder, looked at before anything is loaded
shards               the weight files of a folder, written without being in memory
processes            several processes that share the sequences
waiting              for what another process leaves
signals              the end of a command that is asked to stop
sharding             a model spread over processes (FSDP2)
token_exchange       tokens on their way to the processes that hold their experts
stopwatch            where the seconds go
slices               work in parts of a bounded size
fingerprint          digests of tensors and files
digests              digests of everything in tensors, by name
hub                  is the Hugging Face hub within reach?
yaml_files           YAML from anywhere, of a bounded size
bar                  this project's own, in a terminal
progress_bars        those of other packages, silenced
versions             what a result was made with
"""
