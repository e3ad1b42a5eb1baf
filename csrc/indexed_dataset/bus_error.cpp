#include "bus_error.h"

#include <pthread.h>
#include <signal.h>

namespace illada {

thread_local sigjmp_buf* bus_error_return = nullptr;
std::atomic<bool> bus_error_handler_unsure{false};

namespace {

struct sigaction previous;  // of whoever had the signal before
thread_local bool passed_on __attribute__((tls_model("initial-exec"))) = false;

void OnBusError(int signal, siginfo_t* info, void* context) {
  if (bus_error_return != nullptr) siglongjmp(*bus_error_return, 1);
  const bool is_handler = previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN;
  // one that was installed after this one and hands the signal back would be asked again and again
  if (is_handler && !passed_on) {
    passed_on = true;
    if ((previous.sa_flags & SA_SIGINFO) != 0)
      previous.sa_sigaction(signal, info, context);
    else
      previous.sa_handler(signal);
    passed_on = false;
    return;
  }
  struct sigaction last = {};
  last.sa_handler = is_handler ? SIG_DFL : previous.sa_handler;
  sigaction(signal, &last, nullptr);
  raise(signal);
}

bool IsOurs(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) != 0 && action.sa_sigaction == OnBusError;
}

}  // namespace

void InstallBusErrorHandler() {
  [[maybe_unused]] static const int registered =
      pthread_atfork(nullptr, nullptr, [] { bus_error_handler_unsure = true; });
  bus_error_handler_unsure = false;
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) == 0 && IsOurs(now)) return;
  struct sigaction action = {};
  action.sa_sigaction = OnBusError;
  sigemptyset(&action.sa_mask);
  // not blocked while it is handled: a jump out of the handler would leave it blocked
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  // another thread may have been first
  if (sigaction(SIGBUS, &action, &now) == 0 && !IsOurs(now)) previous = now;
}

}  // namespace illada
