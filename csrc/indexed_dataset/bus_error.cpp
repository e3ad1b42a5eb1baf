#include "bus_error.h"

#include <signal.h>

#include <mutex>

namespace illada {

thread_local sigjmp_buf* bus_error_return = nullptr;

namespace {

struct sigaction previous;

void OnBusError(int signal, siginfo_t* info, void* context) {
  if (bus_error_return != nullptr) siglongjmp(*bus_error_return, 1);
  if ((previous.sa_flags & SA_SIGINFO) != 0) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
  sigaction(signal, &previous, nullptr);
  raise(signal);
}

}  // namespace

void InstallBusErrorHandler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = OnBusError;
    sigemptyset(&action.sa_mask);
    // not blocked while it is handled: a jump out of the handler would leave it blocked
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGBUS, &action, &previous);
  });
}

}  // namespace illada
