// Which arguments the functions of this library take: Python refuses a library of another interface, since an old one
// beside newer sources of an editable installation would write anywhere. The number rises with each change of them.
extern "C" int vllm_sparse_interface() { return 3; }
