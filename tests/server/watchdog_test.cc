#include "server/watchdog.h"

#include <gtest/gtest.h>

#include <csignal>
#include <future>

#include "server/event_pipe.h"
#include "tests/support/fake_engine.h"

namespace spillway {
namespace {

constexpr absl::Duration kInterval = absl::Milliseconds(1);

TEST(Watchdog, TellsOfAStalledEngineOnce) {
  FakeEngine engine({});
  std::promise<std::string> failure;  // a second set_value would throw
  const Watchdog watchdog(engine, kInterval, [&](const std::string& text) { failure.set_value(text); });
  engine.Stall();
  EXPECT_EQ(failure.get_future().get(), "the engine has stalled");
}

TEST(Watchdog, TellsOfAFailedEngine) {
  FakeEngine engine({});
  std::promise<std::string> failure;
  const Watchdog watchdog(engine, kInterval, [&](const std::string& text) { failure.set_value(text); });
  engine.Fail(absl::InternalError("a broken kernel"));
  EXPECT_EQ(failure.get_future().get(), "a broken kernel");
}

TEST(Watchdog, StopsWhileTheEngineIsAlive) {
  FakeEngine engine({});
  const Watchdog watchdog(engine, absl::Hours(1), [](const std::string&) { FAIL(); });
}

TEST(EventPipe, SignalsAndPostsAreEventsInOrder) {
  EventPipe events;
  ASSERT_TRUE(events.Open().ok());
  ASSERT_TRUE(events.CatchSignals().ok());
  std::raise(SIGTERM);
  events.Post(ServerEvent::kDrained);
  std::raise(SIGINT);
  EXPECT_EQ(events.Await(absl::InfiniteFuture()), ServerEvent::kSignal);
  EXPECT_EQ(events.Await(absl::InfiniteFuture()), ServerEvent::kDrained);
  EXPECT_EQ(events.Await(absl::InfiniteFuture()), ServerEvent::kSignal);
  EXPECT_EQ(events.Await(absl::InfinitePast()), std::nullopt);
}

}  // namespace
}  // namespace spillway
