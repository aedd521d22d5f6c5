// A chat, whole and streamed, with the openai package for Node.js. OPENAI_BASE_URL and OPENAI_API_KEY tell it where Fallow is.
import OpenAI from "openai";

const client = new OpenAI();
const model = "smollm2-135m-instruct";

const answer = await client.chat.completions.create({
  model,
  messages: [{ role: "user", content: "Name one colour." }],
  max_tokens: 20,
  temperature: 0,
});
console.log(answer.choices[0].message.content);

const stream = client.chat.completions.stream({ model, messages: [{ role: "user", content: "Count to five." }], max_tokens: 30 });
stream.on("content", (delta) => process.stdout.write(delta));
const whole = await stream.finalChatCompletion();
console.log(`\n${whole.choices[0].finish_reason}`);

const response = await client.responses.create({ model, input: "Name one fruit.", max_output_tokens: 20, store: false });
console.log(response.output_text);
