"""Which tensors of a TensorFlow graph a GPU would hand to its host.

A wheel of TensorFlow for Linux has the kernels of GPUs, also where there is none: their
registrations say which operations have one, and which of its tensors are in the memory
of the host.
"""

from tensorflow.python.framework import kernels, op_def_registry


def handed_to_host(graph):
    """Return the edges from the GPU to the host, and the waits for them in a row.

    An edge is the producer's name and the consumer's; a wait is counted for an edge
    behind one that the host has already waited for.
    """
    depth, edges = {}, []
    for operation in graph.get_operations():
        kernel, here = _gpu_kernel(operation), 0
        host_arguments = _host_arguments(operation, kernel)
        for tensor, argument in zip(
            operation.inputs, _arguments(operation, "input_arg"), strict=True
        ):
            producer = tensor.op
            before = depth[producer.name]
            source = _gpu_kernel(producer)
            outputs = _arguments(producer, "output_arg")
            from_host = source is None or outputs[tensor.value_index] in (
                _host_arguments(producer, source)
            )
            to_host = kernel is None or argument in host_arguments
            if not from_host and to_host:
                edges.append((producer.name, operation.name))
                before += 1
            here = max(here, before)
        depth[operation.name] = here
    return edges, max(depth.values(), default=0)


def _arguments(operation, kind):
    """The name of the argument that each tensor is for: a list is one argument."""
    names = []
    for argument in getattr(op_def_registry.get(operation.type), kind):
        count = 1
        if argument.number_attr:
            count = operation.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            count = len(operation.get_attr(argument.type_list_attr))
        names += [argument.name] * count
    return names


# Fed values, and variables, which are where they are used.
_ANYWHERE = ("Placeholder", "Const", "NoOp", "ReadVariableOp")


def _gpu_kernel(operation):
    """The registration of the operation's kernel on a GPU, or None."""
    if operation.type in _ANYWHERE:
        return None if operation.type == "Const" else ()
    for kernel in kernels.get_registered_kernels_for_op(operation.type).kernel:
        if kernel.device_type in ("GPU", "DEFAULT") and all(
            operation.node_def.attr[constraint.name].type
            in constraint.allowed_values.list.type
            for constraint in kernel.constraint
        ):
            return kernel
    return None


def _host_arguments(operation, kernel):
    return () if kernel in (None, ()) else tuple(kernel.host_memory_arg)
