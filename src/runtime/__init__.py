"""What every script needs whatever it computes: errors, flags, progress, processes, Jittor, files.

Nothing here knows of GPT-2, and nothing here imports a module outside this folder.
"""
