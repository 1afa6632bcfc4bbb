// Runs a .pt2 file on an image of zeros to one and writes what it gives: the file's own code and
// libtorch, without Python.
//
//   run_package MODEL.pt2 BATCH CHANNELS HEIGHT WIDTH OUTPUT
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ops/arange.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 7) {
        std::cerr << "usage: run_package MODEL.pt2 BATCH CHANNELS HEIGHT WIDTH OUTPUT\n";
        return 2;
    }
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (int i = 2; i < 6; ++i) {
        shape.push_back(std::atoll(argv[i]));
        count *= shape.back();
    }
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    at::Tensor image = (at::arange(count, at::kFloat) / static_cast<double>(count)).view(shape);
    std::vector<at::Tensor> outputs = loader.run({image});
    std::ofstream file(argv[6], std::ios::binary);
    for (const at::Tensor& output : outputs) {
        const at::Tensor numbers = output.contiguous();
        file.write(static_cast<const char*>(numbers.data_ptr()),
                   static_cast<std::streamsize>(numbers.nbytes()));
    }
    return file.good() ? 0 : 1;
}
