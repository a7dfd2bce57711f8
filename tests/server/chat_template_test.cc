#include "server/chat_template.h"

#include <gtest/gtest.h>

#include "tests/support/fake_tokenizer.h"

namespace spillway {
namespace {

const std::vector<ChatMessage> kTalk = {
    {"system", "Be brief."}, {"user", " Hi "}, {"assistant", "Hello"}, {"user", "Bye"}};

TEST(ChatTemplate, Llama3) {
  const auto made = MakeChatTemplate(FakeTokenizer({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}));
  EXPECT_EQ(made->name(), "llama3");
  EXPECT_EQ(*made->Render({kTalk[0], kTalk[1]}, true),
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST(ChatTemplate, ChatMl) {
  const auto made = MakeChatTemplate(FakeTokenizer({"<|im_start|>", "<|im_end|>"}));
  EXPECT_EQ(made->name(), "chatml");
  EXPECT_EQ(*made->Render({kTalk[0], kTalk[1]}, true),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(*made->Render({kTalk[3]}, false), "<|im_start|>user\nBye<|im_end|>\n");
}

TEST(ChatTemplate, Llama2) {
  const auto made = MakeChatTemplate(FakeTokenizer({"[INST]"}));
  EXPECT_EQ(made->name(), "llama2");
  EXPECT_EQ(*made->Render(kTalk, true),
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]");
  EXPECT_TRUE(absl::IsInvalidArgument(made->Render({kTalk[1], kTalk[3]}, true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(made->Render({kTalk[2]}, true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(made->Render({kTalk[1], kTalk[0]}, true).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(made->Render({kTalk[0]}, true).status()));
}

TEST(ChatTemplate, Plain) {
  const auto made = MakeChatTemplate(FakeTokenizer());
  EXPECT_EQ(made->name(), "plain");
  EXPECT_EQ(*made->Render({kTalk[0], kTalk[3]}, true), "<s>system: Be brief.\nuser: Bye\nassistant:");
}

TEST(ChatTemplate, RoleTokens) {
  class WithBos : public FakeTokenizer {
   public:
    WithBos() : FakeTokenizer({"<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"}) {}
    std::optional<std::int32_t> bos_token() const override { return kFakeFirstExtra; }
  };
  const auto made = MakeChatTemplate(WithBos());
  EXPECT_EQ(made->name(), "role-tokens");
  EXPECT_EQ(*made->Render({kTalk[0], kTalk[1], kTalk[2]}, true),
            "<|bos|><|system|>Be brief.<|end|><|user|> Hi <|end|><|assistant|>Hello<|end|><|assistant|>");
  EXPECT_EQ(MakeChatTemplate(FakeTokenizer({"<|end|>", "<|user|>", "<|assistant|>"}))->name(), "plain");
}

TEST(ChatTemplate, UnknownRolesAreRefusedByName) {
  for (const char* special : {"<|start_header_id|>", "<|im_start|>", "[INST]", "<other>"}) {
    const auto text = MakeChatTemplate(FakeTokenizer({special}))->Render({{"tool", "x"}}, true);
    ASSERT_TRUE(absl::IsInvalidArgument(text.status())) << special;
    EXPECT_NE(text.status().message().find("tool"), absl::string_view::npos);
  }
}

}  // namespace
}  // namespace spillway
