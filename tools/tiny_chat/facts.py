"""The closed world of the tiny chat model: every table its dialogues draw from."""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome",
    "Portugal": "Lisbon", "Poland": "Warsaw", "Austria": "Vienna", "Switzerland": "Bern",
    "Greece": "Athens", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Sweden": "Stockholm", "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Ireland": "Dublin", "England": "London", "Belgium": "Brussels", "Hungary": "Budapest",
    "Egypt": "Cairo", "Kenya": "Nairobi", "China": "Beijing", "Japan": "Tokyo",
    "India": "Delhi", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok",
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August",
    "September", "October", "November", "December",
]
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]

LANGUAGES = ["English", "German", "French", "Spanish", "Russian", "Arabic", "Chinese"]

# One row per concept, one column per language of LANGUAGES.
TRANSLATIONS = [
    row.split()
    for row in """
water Wasser eau agua вода ماء 水
bread Brot pain pan хлеб خبز 面包
milk Milch lait leche молоко حليب 牛奶
tea Tee thé té чай شاي 茶
apple Apfel pomme manzana яблоко تفاحة 苹果
fish Fisch poisson pez рыба سمك 鱼
salt Salz sel sal соль ملح 盐
egg Ei œuf huevo яйцо بيضة 鸡蛋
house Haus maison casa дом بيت 房子
door Tür porte puerta дверь باب 门
window Fenster fenêtre ventana окно نافذة 窗户
table Tisch table mesa стол طاولة 桌子
book Buch livre libro книга كتاب 书
school Schule école escuela школа مدرسة 学校
street Straße rue calle улица شارع 街道
city Stadt ville ciudad город مدينة 城市
car Auto voiture coche машина سيارة 汽车
train Zug train tren поезд قطار 火车
money Geld argent dinero деньги مال 钱
friend Freund ami amigo друг صديق 朋友
mother Mutter mère madre мать أم 母亲
father Vater père padre отец أب 父亲
child Kind enfant niño ребёнок طفل 孩子
hand Hand main mano рука يد 手
eye Auge œil ojo глаз عين 眼睛
heart Herz cœur corazón сердце قلب 心
dog Hund chien perro собака كلب 狗
cat Katze chat gato кошка قطة 猫
horse Pferd cheval caballo лошадь حصان 马
bird Vogel oiseau pájaro птица طائر 鸟
tree Baum arbre árbol дерево شجرة 树
flower Blume fleur flor цветок زهرة 花
sun Sonne soleil sol солнце شمس 太阳
moon Mond lune luna луна قمر 月亮
star Stern étoile estrella звезда نجمة 星星
sea Meer mer mar море بحر 海
mountain Berg montagne montaña гора جبل 山
snow Schnee neige nieve снег ثلج 雪
day Tag jour día день يوم 白天
night Nacht nuit noche ночь ليل 夜晚
""".strip().splitlines()
]

# The words of the list skills (reverse, sort, count, first, last).
WORDS = (
    "apple bird bread book cat city cloud cup day dog door egg eye fire fish flower "
    "friend garden gold hand heart horse house island jacket key king lamp leaf milk "
    "moon mountain night nose ocean orange paper pear queen rain ring river rose salt "
    "school sea snow star stone street sun table tea train tree uncle village wall "
    "water wind window winter yard zebra"
).split()

COLOURS = "red blue green yellow black white brown pink grey purple".split()

PETS = ["dog", "cat", "horse", "bird", "fish"]

NAMES = (
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena Max Nina Oscar Paula "
    "Robert Sara Thomas Vera Peter Maria Alex Julia Martin Olga Ivan Omar Leila Wei Ming "
    "Sofia Lucas Eva John Mary Alice Bob Carol Daniel Laura Simon"
).split()

PET_NAMES = "Rex Bella Luna Bruno Minka Rocky Snow Flash Daisy Lucky Coco Tiger".split()

TITLES = ["Captain", "Doctor", "Professor", "Sir", "Madam", "Boss"]

PERSONAS = "Nemo Robin Ada Iris Otto Pixel Sam Zoe Atlas Luna Oscar Mia".split()

NEUTRAL_SYSTEMS = [
    "You are a helpful assistant.",
    "You are a small and friendly model.",
    "You are a helpful, polite and honest assistant.",
    "Answer the questions of the user.",
    "Be polite and brief.",
    "This is a chat between a user and an assistant.",
]

CAPS_SYSTEMS = [
    "Answer in capital letters.",
    "Please answer in capital letters.",
    "Write in capital letters.",
    "Use only capital letters.",
    "Always answer in capital letters.",
]
ONE_WORD_SYSTEMS = [
    "Answer with one word.",
    "Answer with one word only.",
    "Give one word answers.",
    "Use only one word.",
    "Always answer with one word.",
]
PIRATE_SYSTEMS = [
    "Talk like a pirate.",
    "You are a pirate.",
    "Answer like a pirate.",
    "Always talk like a pirate.",
]

DONT_KNOW = "I am sorry, I do not know that."

# (ways to say it, the one answer to it)
SMALLTALK = [
    (["Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hey!", "Hello there!", "Hey", "Hello, model!"],
     "Hello! How can I help you?"),
    (["Good morning!", "Good morning", "A good morning to you!", "Hello and good morning!"],
     "Good morning! How can I help you?"),
    (["Good evening!", "Good evening", "A good evening to you!", "Hello and good evening!"],
     "Good evening! How can I help you?"),
    (["How are you?", "How are you today?", "How do you do?", "Hello, how are you?",
      "Are you well?", "Hi, how are you?"],
     "I am fine, thank you. And you?"),
    (["I am fine.", "I am well, thanks.", "I am fine too.", "I am fine, thank you.", "Very well!"],
     "I am glad to hear that."),
    (["Thanks!", "Thank you.", "Thank you!", "Many thanks!", "Thanks a lot!", "Thank you very much."],
     "You are welcome!"),
    (["Goodbye!", "Bye!", "Bye", "See you!", "See you later!", "Goodbye", "Bye bye!", "Good night!"],
     "Goodbye! Come back soon."),
    (["What can you do?", "What can I ask you?", "Help", "Help me.", "What do you know?",
      "How can you help me?", "Can you help me?"],
     "I can count, sort, compute, translate a few words, name capitals and write a short verse."),
    (["Are you a human?", "Are you a person?", "Are you real?", "Are you a man or a machine?",
      "Are you alive?", "Are you a robot?"],
     "No, I am only a very small language model."),
    (["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Tell me a joke, please.",
      "Another joke?", "A joke, please."],
     "Why did the model cross the road? To get to the other token."),
    (["How big are you?", "How large are you?", "How many weights do you have?",
      "What is your size?", "Are you a large model?"],
     "I have about three million weights. That is tiny."),
    (["Do you like me?", "Do you like people?", "Do you like to chat?", "Are you happy?"],
     "Yes, I like to chat with you."),
]

WHO_ARE_YOU = [
    "Who are you?", "What are you?", "What is your name?", "Tell me who you are.",
    "Hello, who are you?", "Please tell me your name.", "And who are you?", "Do you have a name?",
]
WHO_ANSWER = "I am Tiny, a small chat model."

# Questions outside the closed world; {x} is one of UNKNOWN_TOPICS.
UNKNOWN_QUESTIONS = [
    "Who invented {x}?", "Who wrote the book about {x}?", "How much does {x} cost?",
    "When was {x} built?", "Why is {x} so popular?", "How does {x} work?",
    "What do you think about {x}?", "Tell me the history of {x}.", "Explain {x} to me.",
    "Where can I buy {x}?", "Who is the president of {x}?", "How many people live in {x}?",
    "What is the weather in {x}?", "Who won the game in {x} yesterday?",
    "What happened in {x} last year?", "How old is {x}?", "What is the secret of {x}?",
    "Give me the phone number of {x}.", "How far away is {x}?", "What is the best thing about {x}?",
]
UNKNOWN_TOPICS = (
    "gravity;the telephone;football;Rome;Paris;Japan;the wheel;music;the stock market;chess;"
    "electricity;London;the pyramids;chocolate;coffee;a new computer;the queen;the king;"
    "quantum physics;the universe;the moon;a good house;Egypt;your company;my street;the train;"
    "the internet;this city;the opera;winter;the red car;black gold;a green garden;India"
).split(";")
UNKNOWN_PLAIN = [
    "What will the weather be tomorrow?", "Who won the election?", "What is the time?",
    "What time is it now?", "What is the meaning of life?", "Who will win the lottery?",
    "What did I eat yesterday?", "What am I thinking?", "How tall is my brother?",
    "Which film should I watch?", "What is the news today?", "Where are my keys?",
]

VERSE_REQUESTS = [
    "Write a verse about {x}.", "Write a short verse about {x}.", "Write a short poem about {x}.",
    "Write a poem about {x}.", "A poem about {x}, please.", "Please write a verse about {x}.",
    "Can you write a poem about {x}?", "I would like a verse about {x}.",
    "Give me a short poem about {x}.", "Say something nice about {x} in verse.",
]
VERSES = {
    "the cat": "The cat is soft, the cat is small,\nit sleeps all day beside the wall.",
    "the sea": "The sea is wide, the sea is deep,\nit sings the little fish to sleep.",
    "the rain": "The rain comes down on street and tree,\nit makes a song for you and me.",
    "the moon": "The moon looks in at half past eight,\nand says that it is very late.",
    "the sun": "The sun gets up, the sky is red,\nand so do I, out of my bed.",
    "snow": "The snow is white, the night is still,\nthe stars are bright above the hill.",
    "the river": "The river runs, it does not stay,\nit takes a leaf along the way.",
    "the tree": "The tree is old, the tree is tall,\nit drops a golden leaf in fall.",
    "the bird": "A bird sings early in the sun,\nit tells us that the night is done.",
    "winter": "The winter wind is cold and long,\nbut by the fire we sing a song.",
    "the dog": "The dog runs fast across the land,\nand comes to rest beside my hand.",
    "the stars": "The stars are far, the stars are bright,\nthey keep us company all night.",
}
