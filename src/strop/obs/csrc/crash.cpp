// The native frames of a thread that dies of a fatal signal, on stderr, before anybody else's handler runs.
//
// strop_crash_install() puts a handler in front of the one that is there (faulthandler's). On a crash it first
// puts that one back, so that a crash in here goes straight to it; then it writes the frames from the
// instruction that crashed outwards, and raises the signal again. Nothing here allocates, and nothing loops:
// SIGINT, SIGTERM and the like are left alone.
//
//     strop: native stack of the thread that crashed, signal 11:
//       native #0 strlen+0x15 in /lib/x86_64-linux-gnu/libc.so.6
//       native #1 +0x7e3a in /usr/lib/x86_64-linux-gnu/libffi.so.8
//
// The number behind + is the offset in the symbol; without a symbol, in the file (as addr2line takes it).

#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

constexpr int FATAL[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
constexpr int MAX_FRAMES = 64;
constexpr int OWN_FRAMES = 2;  // this handler and the kernel's return from it
constexpr size_t STACK_BYTES = 1 << 16;

struct sigaction before[NSIG];
char stack[STACK_BYTES];  // an overflown stack cannot hold the handler's frames

// One line, written at once: other threads may be writing too.
class Line {
 public:
  Line& text(const char* s) {
    size_t n = strnlen(s, sizeof(buffer_) - 1 - used_);
    memcpy(buffer_ + used_, s, n);
    used_ += n;
    return *this;
  }

  Line& number(uintptr_t value, unsigned base) {
    char digits[2 * sizeof(value) + 4];
    char* at = digits + sizeof(digits) - 1;
    *at = 0;
    do {
      *--at = "0123456789abcdef"[value % base];
      value /= base;
    } while (value != 0);
    return text(at);
  }

  void end() {
    buffer_[used_++] = '\n';
    ssize_t written = write(STDERR_FILENO, buffer_, used_);
    (void)written;  // there is nobody to tell
    used_ = 0;
  }

 private:
  char buffer_[1024];
  size_t used_ = 0;
};

void* interrupted(void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
  return nullptr;
#endif
}

// A return address may lie behind its function, whose last act was a call: the call itself is looked up.
void write_frame(int number, void* address, bool returned_to) {
  Line line;
  address = static_cast<char*>(address) - (returned_to ? 1 : 0);
  line.text("  native #").number(number, 10).text(" ");
  Dl_info info;
  if (dladdr(address, &info) == 0) {
    line.text("0x").number(reinterpret_cast<uintptr_t>(address), 16).text(" in ?").end();
    return;
  }
  const void* start = info.dli_sname != nullptr ? info.dli_saddr : info.dli_fbase;
  line.text(info.dli_sname != nullptr ? info.dli_sname : "").text("+0x");
  line.number(reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(start), 16);
  line.text(" in ").text(info.dli_fname).end();
}

void on_crash(int signal, siginfo_t*, void* context) {
  sigaction(signal, &before[signal], nullptr);
  void* frames[MAX_FRAMES];
  const int count = backtrace(frames, MAX_FRAMES);
  int first = OWN_FRAMES;  // after a jump to nowhere, the place is not among the frames
  for (int i = 0; i < count; ++i) {
    if (frames[i] == interrupted(context)) {
      first = i;
      break;
    }
  }
  Line line;
  line.text("strop: native stack of the thread that crashed, signal ").number(signal, 10).text(":").end();
  for (int i = first; i < count; ++i) {
    write_frame(i - first, frames[i], frames[i] != interrupted(context));
  }
  line.end();
  raise(signal);
}

}  // namespace

// To be called by the main thread, once the handlers that shall run afterwards are installed. 0, or errno's -1.
extern "C" int strop_crash_install() {
  void* frame;
  backtrace(&frame, 1);  // loads the unwinder, which allocates
  const stack_t own = {stack, 0, STACK_BYTES};
  if (sigaltstack(&own, nullptr) != 0) {
    return -1;
  }
  struct sigaction action = {};
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int signal : FATAL) {
    struct sigaction old;
    if (sigaction(signal, &action, &old) != 0) {
      return -1;
    }
    if ((old.sa_flags & SA_SIGINFO) == 0 || old.sa_sigaction != on_crash) {
      before[signal] = old;
    }
  }
  return 0;
}
