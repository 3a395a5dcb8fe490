"""Write the built-in calibration prompts, src/compile/calibration.jsonl: conversations over everyday topics, small tasks,
code and figures, in the scripts that multilingual tokenizers know.

    python tools/make_calibration.py

Calibration runs a model over them to see what its layers' inputs are like; nothing is learned from them, so an answer
matters only as text of the kind that a model writes. Builds may use the first ones only: kinds alternate.
"""

import itertools
import json
import random
from pathlib import Path

OUT = Path("src/compile/calibration.jsonl")
HELD_OUT = Path("tests/data/tiny-chat/conversations.jsonl")
CONVERSATIONS = 320

# Question and answer pairs: one conversation of several turns for each language.
LANGUAGES = {
    "German": [("Wie spät fährt der letzte Zug nach Bremen?", "Der letzte Zug fährt um 23:14 Uhr von Gleis 7."),
               ("Kannst du mir ein Rezept für Kartoffelsuppe geben?", "Kartoffeln, Möhren und Zwiebeln würfeln, in Brühe weich kochen, pürieren und mit Salz, Pfeffer und Muskat abschmecken."),
               ("Danke schön!", "Gern geschehen. Guten Appetit!")],
    "French": [("Peux-tu m'expliquer pourquoi il pleut ?", "L'eau s'évapore, se condense en nuages, puis retombe quand les gouttes deviennent trop lourdes."),
               ("Écris une phrase au passé composé.", "Hier, nous avons visité le musée avec nos amis."),
               ("Merci beaucoup.", "Avec plaisir !")],
    "Spanish": [("¿Cuál es la diferencia entre «ser» y «estar»?", "«Ser» describe lo permanente; «estar», los estados y los lugares."),
                ("¿Qué tiempo hará mañana en Sevilla?", "No puedo consultar el pronóstico, pero en julio suele hacer mucho calor."),
                ("Gracias.", "¡De nada!")],
    "Italian": [("Come si prepara il caffè con la moka?", "Si riempie la base d'acqua, si mette il caffè nel filtro senza pressarlo e si scalda a fuoco basso."),
                ("Che cosa vuol dire «magari»?", "Può voler dire «forse» oppure esprimere un desiderio.")],
    "Portuguese": [("Onde fica a biblioteca mais próxima?", "Fica na praça central, ao lado da escola."),
                   ("A que horas abre?", "Abre às nove da manhã, de segunda a sexta-feira.")],
    "Dutch": [("Hoeveel fietsen zijn er in Nederland?", "Ongeveer drieëntwintig miljoen, meer dan er inwoners zijn."), ("Waarom zoveel?", "Omdat het land vlak is en de afstanden klein zijn.")],
    "Swedish": [("Vad betyder ordet lagom?", "Lagom betyder varken för mycket eller för lite."), ("Ge ett exempel.", "Kaffet är lagom varmt.")],
    "Polish": [("Jak długo gotować jajko na twardo?", "Około dziewięciu minut od zagotowania wody."), ("A na miękko?", "Trzy do czterech minut.")],
    "Czech": [("Kolik obyvatel má Praha?", "Praha má přibližně 1,3 milionu obyvatel."), ("Která řeka jí protéká?", "Vltava.")],
    "Romanian": [("Ce fructe se coc toamna?", "Toamna se coc merele, perele, gutuile și strugurii."), ("Mulțumesc!", "Cu plăcere!")],
    "Hungarian": [("Melyik a leghosszabb folyó Európában?", "A Volga, körülbelül 3500 kilométer."), ("Köszönöm.", "Szívesen!")],
    "Finnish": [("Miksi talvella on pimeää?", "Koska maapallon akseli on kallellaan ja aurinko nousee matalalle."), ("Kiitos!", "Ole hyvä!")],
    "Turkish": [("Bugün hava nasıl?", "Hava durumunu göremiyorum, ama pencereden bakabilirsin."), ("Bana kısa bir şiir yaz.", "Deniz mavi, gök açık, bir martı geçer yavaşça.")],
    "Vietnamese": [("Thủ đô của Việt Nam là gì?", "Thủ đô của Việt Nam là Hà Nội."), ("Thành phố nào đông dân nhất?", "Thành phố Hồ Chí Minh.")],
    "Indonesian": [("Apa perbedaan antara pagi dan siang?", "Pagi adalah waktu setelah matahari terbit; siang adalah tengah hari."), ("Terima kasih.", "Sama-sama.")],
    "Swahili": [("Habari za asubuhi?", "Nzuri sana, karibu. Naweza kukusaidia vipi?"), ("Niambie siku za wiki.", "Jumatatu, Jumanne, Jumatano, Alhamisi, Ijumaa, Jumamosi, Jumapili.")],
    "Russian": [("Сколько будет двенадцать умножить на семь?", "Двенадцать умножить на семь — восемьдесят четыре."),
                ("Переведи на английский: доброе утро.", "Good morning."), ("Напиши короткое письмо другу.", "Привет! Как дела? Приезжай к нам летом, будем ходить в лес за грибами.")],
    "Ukrainian": [("Яка сьогодні дата?", "Я не маю доступу до календаря."), ("Назви пори року.", "Весна, літо, осінь, зима.")],
    "Bulgarian": [("Кои са съседите на България?", "Румъния, Сърбия, Северна Македония, Гърция и Турция.")],
    "Greek": [("Ποια είναι η πρωτεύουσα της Ελλάδας;", "Η πρωτεύουσα της Ελλάδας είναι η Αθήνα."), ("Ευχαριστώ!", "Παρακαλώ!")],
    "Arabic": [("ما هي عاصمة المغرب؟", "عاصمة المغرب هي الرباط."), ("كم عدد أيام الأسبوع؟", "عدد أيام الأسبوع سبعة."), ("شكرا جزيلا", "على الرحب والسعة.")],
    "Persian": [("بهترین فصل برای سفر به شیراز کدام است؟", "بهار، وقتی که باغ‌ها پر از گل هستند."), ("ممنونم", "خواهش می‌کنم.")],
    "Urdu": [("پاکستان کا قومی پھول کیا ہے؟", "پاکستان کا قومی پھول چنبیلی ہے۔")],
    "Hebrew": [("מהי בירת צרפת?", "בירת צרפת היא פריז."), ("תודה רבה", "בבקשה!")],
    "Hindi": [("भारत की राजधानी क्या है?", "भारत की राजधानी नई दिल्ली है।"), ("एक से पाँच तक गिनो।", "एक, दो, तीन, चार, पाँच।")],
    "Bengali": [("বাংলাদেশের রাজধানী কোথায়?", "বাংলাদেশের রাজধানী ঢাকা।")],
    "Tamil": [("தமிழ்நாட்டின் தலைநகரம் எது?", "தமிழ்நாட்டின் தலைநகரம் சென்னை.")],
    "Telugu": [("మీరు ఎలా ఉన్నారు?", "నేను బాగున్నాను, ధన్యవాదాలు.")],
    "Thai": [("วันนี้วันอะไร", "ฉันไม่ทราบวันที่ปัจจุบัน"), ("ขอบคุณครับ", "ยินดีครับ")],
    "Georgian": [("რა არის საქართველოს დედაქალაქი?", "საქართველოს დედაქალაქია თბილისი.")],
    "Armenian": [("Ո՞րն է Հայաստանի մայրաքաղաքը։", "Հայաստանի մայրաքաղաքը Երևանն է։")],
    "Amharic": [("እንደምን አለህ?", "ደህና ነኝ፣ አመሰግናለሁ።")],
    "Chinese": [("请用一句话介绍长城。", "长城是中国古代修建的防御工程，全长两万多公里。"), ("把“谢谢”翻译成英语和法语。", "英语是 thank you，法语是 merci。"),
                ("写一首关于秋天的短诗。", "秋风起，黄叶飞，归雁一行入云微。")],
    "Japanese": [("東京から京都まで新幹線でどのくらいかかりますか。", "のぞみで約二時間十五分です。"), ("「ありがとう」を英語で何と言いますか。", "Thank you と言います。"),
                 ("カタカナで挨拶を書いてください。", "コンニチハ、オゲンキデスカ。")],
    "Korean": [("한국에서 가장 높은 산은 무엇입니까?", "한라산으로 높이는 1,947미터입니다."), ("감사합니다.", "천만에요.")],
}

CAPITALS = {"Austria": "Vienna", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Japan": "Tokyo", "Egypt": "Cairo",
            "Canada": "Ottawa", "Greece": "Athens", "India": "New Delhi", "Chile": "Santiago", "Poland": "Warsaw",
            "Italy": "Rome", "China": "Beijing", "Spain": "Madrid", "Cuba": "Havana", "Russia": "Moscow"}
WORDS = {"water": ("Wasser", "eau", "agua", "вода", "水"), "house": ("Haus", "maison", "casa", "дом", "房子"),
         "bread": ("Brot", "pain", "pan", "хлеб", "面包"), "night": ("Nacht", "nuit", "noche", "ночь", "夜晚"),
         "book": ("Buch", "livre", "libro", "книга", "书"), "tree": ("Baum", "arbre", "árbol", "дерево", "树")}
TONGUES = ("German", "French", "Spanish", "Russian", "Chinese")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {"January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31, "August": 31,
          "September": 30, "October": 31, "November": 30, "December": 31}
NAMES = ("Amina", "Jonas", "Priya", "Mateo", "Yuki", "Olga", "Samuel", "Leila", "Victor", "Chloe", "Dmitri", "Ines")
THINGS = ("apple", "chair", "river", "lamp", "cloud", "stone", "violin", "garden", "ticket", "pencil", "bridge", "coat",
          "window", "orange", "mountain", "letter", "basket", "candle")
ANIMALS = ("dog", "cat", "horse", "parrot", "rabbit", "goldfish", "sheep", "hamster")
SYSTEMS = ("", "", "", "You are a helpful assistant.", "Answer briefly.", "You are a patient teacher. Use simple words.",
           "This is a chat between a user and an assistant. The assistant is polite and exact.",
           "You write in capital letters only.", "Your name is Robin.", "Answer in one word.", "You speak like a sailor.")

PASSAGES = (
    "The harbour lay quiet in the early light. Two fishing boats had already left, and their wake still rocked the smaller "
    "dinghies against the pier. An old man mended a net, and from the café came the smell of fresh bread.",
    "Photosynthesis is the process by which plants, algae and some bacteria turn light into chemical energy. In the "
    "chloroplasts, light splits water, oxygen is released, and the energy is stored in sugar made from carbon dioxide.",
    "Quarterly revenue rose 4.2 % to $1,234.5 million, while operating costs fell by 1.8 %. The board proposed a dividend "
    "of $0.35 per share, payable on 15 March, and confirmed its guidance for the full year.",
    "To change a flat tyre, park on level ground, loosen the nuts by half a turn, raise the car with the jack, take off the "
    "wheel, fit the spare one, tighten the nuts crosswise, and check the pressure at the next petrol station.",
    "In 1687 Isaac Newton published the Principia, which set out three laws of motion and the law of universal gravitation. "
    "It explained the orbits of planets and the tides by one force that falls with the square of the distance.",
    "Dear Ms Okafor, thank you for your letter of 3 May. We are sorry that your parcel arrived damaged. A replacement was "
    "sent today by express and should reach you within two working days; you need not return the first one.",
    "The court held that a contract needs an offer, an acceptance and an intention to be bound. As the defendant had only "
    "invited others to negotiate, no contract was formed, and the claim for damages was dismissed.",
    "Add the flour, a pinch of salt and the melted butter, and stir until the dough is smooth. Let it rest for thirty "
    "minutes, roll it out thinly, cut circles with a glass, and bake them at 180 °C until they are golden.",
)
CODE = (
    ("Write a Python function that tests whether a number is prime.",
     "```python\ndef is_prime(n: int) -> bool:\n    if n < 2:\n        return False\n    i = 2\n    while i * i <= n:\n        if n % i == 0:\n            return False\n        i += 1\n    return True\n```"),
    ("What does this SQL do?\n\nSELECT city, COUNT(*) AS n FROM users WHERE active = 1 GROUP BY city ORDER BY n DESC LIMIT 5;",
     "It lists the five cities with the most active users, and how many each has."),
    ("Reverse a string in JavaScript.", "```js\nconst reverse = (s) => [...s].reverse().join(\"\");\n```"),
    ("Turn this into JSON: name Ada Lovelace, born 1815, fields mathematics and computing.",
     "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"fields\": [\"mathematics\", \"computing\"]}"),
    ("How do I list all files larger than 100 MB on Linux?", "find / -type f -size +100M -exec ls -lh {} \\; 2>/dev/null"),
    ("Why does `let v = vec![1]; let w = v; println!(\"{:?}\", v);` not compile in Rust?",
     "`v` was moved into `w`. Borrow it with `&v`, or call `v.clone()`."),
    ("Write HTML for a link to https://example.org that opens in a new tab.",
     "<a href=\"https://example.org\" target=\"_blank\" rel=\"noopener\">Example</a>"),
    ("Solve x^2 - 5x + 6 = 0.", "x² − 5x + 6 = (x − 2)(x − 3), so x = 2 or x = 3."),
)
CHAT = (
    ("Hello! How are you today?", "Hello! I am fine, thank you. What can I do for you?"),
    ("Tell me a joke.", "Why did the scarecrow get a prize? He was outstanding in his field."),
    ("Who wrote Pride and Prejudice?", "Jane Austen wrote it; it was published in 1813."),
    ("What will the stock market do next week?", "I do not know, and nobody can be sure."),
    ("Give me three tips for better sleep.", "1. Go to bed at the same time.\n2. Keep the room dark and cool.\n3. Put the phone away an hour before."),
    ("Recommend a book for a rainy day.", "Try The Hobbit: a short journey with dragons, riddles and a warm ending."),
    ("Write two lines about the moon.", "The moon is a lamp that the night has hung,\nabove the roofs where the bells are rung."),
    ("Is a tomato a fruit?", "Botanically yes: it grows from the flower and holds seeds. In the kitchen it is a vegetable."),
    ("Good night!", "Good night! Sleep well."),
    ("I feel tired and sad.", "I am sorry to hear that. Would a short walk, or a talk with a friend, help?"),
    ("Explain inflation to a child.", "When everything in the shop slowly costs more, the same coins buy fewer sweets: that is inflation."),
    ("What is the speed of light?", "About 299,792 kilometres per second in a vacuum."),
)


def small_task(rng):
    """A question with one right answer, and that answer."""
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    items = rng.sample(THINGS, rng.randint(3, 6))
    kind = rng.randrange(14)
    if kind == 0:
        return rng.choice((f"What is {a} + {b}?", f"{a} + {b} = ?", f"Please add {a} and {b}.")), f"{a} + {b} = {a + b}."
    if kind == 1:
        return rng.choice((f"What is {a + b} - {a}?", f"Take {a} from {a + b}.")), f"{a + b} - {a} = {b}."
    if kind == 2:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.")), f"{a} * {b} = {a * b}."
    if kind == 3:
        return f"Which is smaller, {a} or {b + 40}?", f"{a} is smaller."
    if kind == 4:
        return f"Sort these words: {', '.join(items)}.", f"{', '.join(sorted(items))}."
    if kind == 5:
        return f"Reverse this list: {', '.join(items)}.", f"{', '.join(reversed(items))}."
    if kind == 6:
        return f"How many words are in this list: {' '.join(items)}?", f"There are {len(items)} words."
    if kind == 7:
        return f"What is the last word: {' '.join(items)}?", f"The last word is {items[-1]}."
    if kind == 8:
        day = rng.randrange(7)
        return f"What day comes after {DAYS[day]}?", f"The day after {DAYS[day]} is {DAYS[(day + 1) % 7]}."
    if kind == 9:
        month = rng.choice(list(MONTHS))
        return f"How many days does {month} have?", f"{month} has {MONTHS[month]} days."
    if kind == 10:
        country = rng.choice(list(CAPITALS))
        ask = rng.choice(("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"))
        return ask.format(country), f"The capital of {country} is {CAPITALS[country]}."
    if kind == 11:
        word, tongue = rng.choice(list(WORDS)), rng.randrange(5)
        return f"What is {word} in {TONGUES[tongue]}?", f"{WORDS[word][tongue]}"
    if kind == 12:
        word = rng.choice(THINGS)
        return f"Spell the word {word} backwards.", word[::-1]
    return rng.choice(CHAT)


def memory(rng):
    name, animal, thing = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(THINGS)
    return [(f"Hi, I am {name}. I have a {animal} called {rng.choice(NAMES)}.", f"Nice to meet you, {name}!"),
            small_task(rng),
            (f"I lost my {thing} today.", f"I am sorry about your {thing}. Where did you see it last?"),
            rng.choice((("What is my name?", f"Your name is {name}."), ("Which animal do I have?", f"You have a {animal}.")))]


def conversations():
    """Turns of one conversation after another, kinds alternating."""
    rng = random.Random(20)
    languages, code = itertools.cycle(LANGUAGES.values()), itertools.cycle(CODE)
    for number in itertools.count():
        kind = number % 8
        if kind in (0, 3, 6):
            turns = [small_task(rng) for _ in range(rng.randint(1, 4))]
        elif kind == 1:
            turns = next(languages)
        elif kind == 2:
            turns = [rng.choice(CHAT), small_task(rng), rng.choice(CHAT)]
        elif kind == 4:
            turns = memory(rng)
        elif kind == 5:
            turns = [next(code), small_task(rng)]
        else:
            ask = rng.choice(("Summarize this text: ", "What is this about? ", "Correct the spelling: ", "Rewrite this: "))
            passage = rng.choice(PASSAGES)
            turns = [(ask + passage, passage.split(". ")[0] + "."), rng.choice(CHAT)]
        yield rng.choice(SYSTEMS), turns


def main():
    held_out = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    openings = {turn["user"] for conversation in held_out for turn in conversation["turns"][:1]}
    with OUT.open("w", encoding="utf-8") as out:
        seen = set()
        for system, turns in conversations():
            if len(seen) == CONVERSATIONS:
                break
            if turns[0][0] in openings:
                continue  # quality is measured on these
            messages = [{"role": "system", "content": system}] if system else []
            for user, answer in turns:
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            # A prompt ends with a user's message.
            messages.append({"role": "user", "content": "Thank you. Go on, please."})
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                out.write(line + "\n")


if __name__ == "__main__":
    main()
