// A process that dies by SIGKILL while it writes and reads, again and again over one directory.

#include <sys/wait.h>

#include <array>
#include <csignal>
#include <random>

#include "tests/kvstore/file_tier_fixture.h"

namespace spillway {
namespace {

constexpr std::uint64_t kNumbers = 400;

class FileTierCrashTest : public FileTierFixture {
 protected:
  // Puts and gets without end, several in flight; each finished one is a byte into `progress`.
  [[noreturn]] void Work(int progress, std::uint64_t seed) const {
    std::vector<std::vector<std::byte>> bytes;
    for (std::uint64_t number = 0; number < kNumbers; ++number) bytes.push_back(Bytes(number));
    absl::StatusOr<std::unique_ptr<Tier>> tier = MakeFileTier(options_);
    if (!tier.ok()) ::_exit(1);
    std::mt19937_64 random(seed);
    std::vector<std::byte> into(options_.block_bytes);
    while (true) {
      for (int i = 0; i < 8; ++i) {
        const std::uint64_t number = random() % kNumbers;
        (*tier)->Put(KeyOf(number), TokensOf(number), bytes[number], [progress](const absl::Status& status) {
          if (status.ok() && ::write(progress, "p", 1) != 1) ::_exit(2);
        });
      }
      const std::uint64_t number = random() % kNumbers;
      if (GetAndWait(**tier, number, into).ok() && into != bytes[number]) ::_exit(3);
    }
  }
};

TEST_F(FileTierCrashTest, KilledAtAnyTimeItServesWhatIsRight) {
  options_.block_bytes = 20'000;
  options_.budget_bytes = 4 << 20;
  const int descriptors = OpenDescriptors();
  std::mt19937_64 random(11);
  std::int64_t torn = 0;
  for (int round = 0; round < 12; ++round) {
    std::array<int, 2> pipe{};
    ASSERT_EQ(::pipe(pipe.data()), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(pipe[0]);
      Work(pipe[1], random());
    }
    ::close(pipe[1]);
    // Killed after a number of writes that differs from round to round, somewhere inside later ones.
    std::uint64_t left = 50 + random() % 400;
    for (char byte = 0; left > 0 && ::read(pipe[0], &byte, 1) == 1; --left) {
    }
    EXPECT_EQ(left, 0U) << "the child ended by itself";
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "exit status " << WEXITSTATUS(status);
    ::close(pipe[0]);

    EXPECT_LE(DiskUsage(), options_.budget_bytes);
    const std::unique_ptr<Tier> tier = Open();
    ASSERT_NE(tier, nullptr) << "the dead process owns nothing";
    const std::int64_t resident = tier->stats().resident_blocks;
    EXPECT_GT(resident, 0);
    for (std::uint64_t number = 0; number < kNumbers; ++number) {
      const absl::Status got = Get(*tier, number);
      EXPECT_TRUE(got.ok() || absl::IsNotFound(got) || absl::IsDataLoss(got)) << got;
    }
    torn += tier->stats().checksum_failures;
    EXPECT_GE(tier->stats().hits, resident - 1) << "one write at a time can be torn";
    EXPECT_EQ(Names().size(), 2U);
    EXPECT_LE(DiskUsage(), options_.budget_bytes);
  }
  EXPECT_EQ(torn, 0) << "what a killed process has written is in order";
  EXPECT_EQ(OpenDescriptors(), descriptors);
}

}  // namespace
}  // namespace spillway
