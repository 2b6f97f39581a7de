"""What runs inside of the sandbox, on the standard library alone.

Four processes, each the parent of the next:

    mtp  --job-->  guard  --fork-->  referee  --fork-->  candidate
                   kills at the     runs the tests,     runs the generated code, and answers
                   time limit       owns the verdict    with data what the referee asks

The referee is the first process of the namespaces: when it ends, the kernel kills what is left in them.
"""
