// The scheduler behind cuda_runtime.h, and the few symbols of a CUDA build of torch that kernel launches use.
#undef _FORTIFY_SOURCE  // its longjmp does not allow a change of stacks

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "prelude.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class State { kNew, kReady, kAtWarp, kAtBlock, kDone };

// A fiber starts in `context` and continues at `place`: setjmp and longjmp, unlike swapcontext, need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  State state = State::kNew;
  bool started = false;
  dim3 index;
};

std::mt19937_64 generator;
std::vector<Fiber> fibers;
std::vector<uint64_t> slots;
std::vector<std::pair<char*, size_t>> shared_memory;
jmp_buf scheduler;
int running;
const std::function<void()>* body;
std::string failure;
int64_t launches = 0;

int block_threads() { return static_cast<int>(blockDim.x * blockDim.y * blockDim.z); }

// Goes back to the scheduler until it resumes this fiber.
void leave(Fiber& fiber, State state) {
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// A fiber that has returned from the kernel waits here for the next block.
void enter() {
  while (true) {
    (*body)();
    leave(fibers[running], State::kDone);
  }
}

void prepare(int t) {
  Fiber& fiber = fibers[t];
  if (fiber.state != State::kDone) {  // new, or stopped half-way by a failure
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.started = false;
  }
  fiber.state = State::kReady;
  const unsigned u = static_cast<unsigned>(t);
  fiber.index = dim3(u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y);
}

// Releases the threads [begin, end) if all of them wait at `state`; a partial wait that can't be completed is an error.
bool release(int begin, int end, State state, const char* what) {
  int waiting = 0, done = 0;
  for (int t = begin; t < end; ++t) {
    waiting += fibers[t].state == state;
    done += fibers[t].state == State::kDone;
  }
  if (waiting == 0) return false;
  if (done > 0) failure = std::string(what) + " that threads which have returned cannot reach";
  if (waiting < end - begin) return false;
  for (int t = begin; t < end; ++t) fibers[t].state = State::kReady;
  return true;
}

// Runs a warp until all its threads wait at a block barrier or have returned.
void run_warp(int begin, int end) {
  std::vector<int> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  do {
    std::shuffle(order.begin(), order.end(), generator);
    for (int t : order) {
      if (fibers[t].state != State::kReady) continue;
      running = t;
      threadIdx = fibers[t].index;
      resume(fibers[t]);
    }
  } while (release(begin, end, State::kAtWarp, "a warp barrier") && failure.empty());
}

// Runs one block to its end. Between two block barriers, the warps run one after the other, each as far as it can.
void run_block() {
  const int threads = block_threads();
  for (auto [start, bytes] : shared_memory) std::memset(start, 0xff, bytes);
  for (int t = 0; t < threads; ++t) prepare(t);
  std::vector<int> warps((threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  do {
    std::shuffle(warps.begin(), warps.end(), generator);
    for (int warp : warps) run_warp(warp * kWarp, std::min((warp + 1) * kWarp, threads));
  } while (release(0, threads, State::kAtBlock, "a block barrier") && failure.empty());
  for (int t = 0; t < threads && failure.empty(); ++t) {
    if (fibers[t].state != State::kDone) failure = "threads wait at different barriers";
  }
}

bool within_limits(dim3 grid, dim3 block) {
  const bool blocks = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y > 0 && grid.y <= 65535 && grid.z == 1;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return blocks && threads > 0 && threads <= 1024;
}

}  // namespace

int lane() { return running % kWarp; }

uint64_t* lane_slot(int lane) { return &slots[(running / kWarp * kWarp + lane) * kSlots]; }

void wait(Scope scope) { leave(fibers[running], scope == Scope::kWarp ? State::kAtWarp : State::kAtBlock); }

cudaError_t run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  if (!within_limits(grid, block)) return cudaErrorInvalidConfiguration;
  ++launches;
  gridDim = grid;
  blockDim = block;
  body = &thread;
  failure.clear();
  if (fibers.size() < static_cast<size_t>(block_threads())) fibers.resize(block_threads());
  slots.resize(1024 * kSlots);
  for (blockIdx.y = 0; blockIdx.y < grid.y && failure.empty(); ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x && failure.empty(); ++blockIdx.x) run_block();
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Sets the order in which fibers run from now on.
EXPORTED void simt_seed(uint64_t seed) { simt::generator.seed(seed); }

// Kernels launched so far.
EXPORTED int64_t simt_launches() { return simt::launches; }

// Names a __shared__ variable, `offset` bytes after simt_seed. These variables are statics of the kernels, so only
// the symbol table lists them all.
EXPORTED void simt_add_shared(int64_t offset, size_t bytes) {
  simt::shared_memory.emplace_back(reinterpret_cast<char*>(&simt_seed) + offset, bytes);
}

extern "C" int32_t simt_device_type_cuda() { return 0; }  // the type of the CPU

extern "C" AOTITorchError simt_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError simt_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char* file, const char*, uint32_t line, bool,
                                                   char** message) {
  const std::string cause = error == cudaErrorInvalidConfiguration ? "invalid configuration" : simt::failure;
  *message = error == 0 ? nullptr : strdup((std::string(file) + ":" + std::to_string(line) + ": " + cause).c_str());
  return AOTI_TORCH_SUCCESS;
}

extern "C" void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
