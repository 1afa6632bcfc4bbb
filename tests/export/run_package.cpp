// Runs a .pt2 file on an image of zeros to one and writes what it gives: the file's own code and
// libtorch, and the recurrences of the library beside it, without Python.
//
//   run_package MODEL.pt2 LIBRARY.so BATCH CHANNELS HEIGHT WIDTH OUTPUT
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ops/empty.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 8) {
        std::cerr << "usage: run_package MODEL.pt2 LIBRARY.so BATCH CHANNELS HEIGHT WIDTH OUTPUT\n";
        return 2;
    }
    if (!dlopen(argv[2], RTLD_NOW)) {
        std::cerr << dlerror() << '\n';
        return 1;
    }
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (int i = 3; i < 7; ++i) {
        shape.push_back(std::atoll(argv[i]));
        count *= shape.back();
    }
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    at::Tensor image = at::empty(shape, at::kFloat);
    float* const numbers = image.mutable_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(i) / count;
    std::vector<at::Tensor> outputs = loader.run({image});
    std::ofstream file(argv[7], std::ios::binary);
    for (const at::Tensor& output : outputs) {
        const at::Tensor numbers = output.contiguous();
        file.write(static_cast<const char*>(numbers.data_ptr()),
                   static_cast<std::streamsize>(numbers.nbytes()));
    }
    return file.good() ? 0 : 1;
}
